#define EXPFACE_TABLE table_v4
#define EXPFACE_TABLE_NAME "x86-64-v4"
#include "simd/kernels.inl"
