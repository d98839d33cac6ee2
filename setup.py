"""Builds the C++ extension; everything else is in pyproject.toml.

The vector kernels are one source, compiled once for each instruction set and chosen at run time, so
the files of csrc/simd/ get flags of their own. Nothing here needs torch.
"""

import os
import platform
import sys

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

X86_64 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"

# gcc vectorises the exponential only with the two -fno- flags; -ffast-math would break its result.
COMMON_FLAGS = ["-O3", "-fno-trapping-math", "-fno-math-errno"] if sys.platform != "win32" else ["/O2"]
# No -march=native anywhere: the binary has to run on another machine than the one that built it.
VARIANT_FLAGS = {
    "kernels_base.cpp": [],
    "kernels_v3.cpp": ["-march=x86-64-v3"],
    "kernels_v4.cpp": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


class BuildVariants(build_ext):
    """build_ext that adds the flags of VARIANT_FLAGS to the files they name."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        compile_one = self.compiler._compile

        def compile_with_variant_flags(obj, src, ext_name, cc_args, extra_postargs, pp_opts):
            flags = [*extra_postargs, *VARIANT_FLAGS.get(os.path.basename(src), [])]
            compile_one(obj, src, ext_name, cc_args, flags, pp_opts)

        if X86_64:
            self.compiler._compile = compile_with_variant_flags
        super().build_extension(ext)


simd_sources = ["csrc/simd/kernels_base.cpp"]
if X86_64:
    simd_sources += ["csrc/simd/kernels_v3.cpp", "csrc/simd/kernels_v4.cpp"]

setup(
    ext_modules=[
        Pybind11Extension(
            "expface_kernels._C",
            ["csrc/bindings.cpp", "csrc/margin_softmax.cpp", "csrc/parallel.cpp", *simd_sources],
            include_dirs=["csrc"],
            depends=[
                "csrc/margin_softmax.h",
                "csrc/parallel.h",
                "csrc/simd/kernels.h",
                "csrc/simd/kernels.inl",
            ],
            define_macros=[("EXPFACE_X86_64", "1")] if X86_64 else [],
            extra_compile_args=COMMON_FLAGS,
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildVariants},
)
