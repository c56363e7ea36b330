"""The compiled CPU core; everything else about the project stands in pyproject.toml.

The core is plain C without Python's headers, loaded by ctypes, so one file serves all Python versions.
Where there is no C compiler the build goes on without it and the kernels run their torch reference.
"""

from setuptools import Extension, setup

NATIVE = "src/m27quant/kernels/_native"
SOURCES = (
    "attention",
    "cholesky",
    "core",
    "fp8_dequant",
    "kv_write",
    "linear",
    "norm",
    "nvfp4_dot_avx2",
    "nvfp4_dot_avx512",
    "nvfp4_dot_portable",
    "nvfp4_errors",
    "nvfp4_gemm",
    "nvfp4_gptq",
    "nvfp4_moe",
    "nvfp4_pack",
    "nvfp4_rows",
    "nvfp4_search",
    "nvfp4_search_fp8",
    "nvfp4_stats",
    "router",
)
HEADERS = (
    "attention_chunk",
    "core",
    "kv_cache",
    "nvfp4",
    "nvfp4_bf16",
    "nvfp4_fp8",
    "nvfp4_search",
    "nvfp4_search_lanes",
    "vector",
)

setup(
    ext_modules=[
        Extension(
            "m27quant.kernels._native.core",
            sources=[f"{NATIVE}/{name}.c" for name in SOURCES],
            depends=[f"{NATIVE}/{name}.h" for name in HEADERS],
            # No -ffast-math and no contraction to FMA: every operation is rounded once, as in the reference.
            extra_compile_args=["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"],
            libraries=["m"],
            optional=True,
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
