/* What the loader asks first: is this the core it was written for, and what does it run on here. */
#include "core.h"

M27_EXPORT int m27_abi(void) { return M27_ABI; }

/* The level of M27_CLONES that runs on this machine. */
M27_EXPORT const char *m27_isa(void) {
#if M27_HAS_CLONES
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
    if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
    return "x86-64";
#elif defined(__AVX512BW__)
    return "built for AVX-512";
#elif defined(__AVX2__)
    return "built for AVX2";
#elif defined(__x86_64__)
    return "x86-64";
#elif defined(__aarch64__)
    return "aarch64";
#else
    return "portable C";
#endif
}
