#define EXPFACE_TABLE table_base
#define EXPFACE_TABLE_NAME "baseline"
#include "simd/kernels.inl"
