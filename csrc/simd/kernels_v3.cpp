#define EXPFACE_TABLE table_v3
#define EXPFACE_TABLE_NAME "x86-64-v3"
#include "simd/kernels.inl"
