"""Builds the C++ extension; pyproject.toml holds everything else.

CLAE_FAST_BUILD=auto (the default) builds C++ and goes on as pure Python where that fails, cpu
fails instead, cuda fails without CUDA kernels too, none builds nothing. What was built, or why
not, is written to clae_fast/_build.json.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("CLAE_FAST_BUILD") or "auto"
if MODE not in MODES:
    raise SystemExit(f"CLAE_FAST_BUILD={MODE!r}: expected one of {', '.join(MODES)}")

NAME = "clae_fast._C"  # loaded by torch.ops.load_library, so it has no PyInit
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Python has no abi3
SOURCES = ["csrc/clae_fast.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
# For any processor: the kernels choose their instruction set when they run.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", f"-fmacro-prefix-map={os.getcwd()}/="]
NO_CUDA = "skipped: no CUDA kernels in this version"


class Build(build):
    # Always, so that the facts are written and a stale extension goes where nothing is built.
    sub_commands = [
        (name, None if name == "build_ext" else when) for name, when in build.sub_commands
    ]


class BuildExt(build_ext):
    """PyTorch's BuildExtension run inside, so that only a build imports torch."""

    def run(self) -> None:
        self.facts = {"compiler": None, "torch": None}
        if MODE == "cuda":
            raise SystemExit(f"CLAE_FAST_BUILD=cuda: {NO_CUDA}")
        cpp = "skipped: CLAE_FAST_BUILD=none" if MODE == "none" else self.build_cpp()
        if cpp != "ok":
            if MODE == "cpu":
                raise SystemExit(f"CLAE_FAST_BUILD=cpu: C++ {cpp}")
            self.extensions = []
            print(f"clae_fast: C++ {cpp}")
        print(f"clae_fast: CUDA {NO_CUDA}")
        self.write_facts({"cpp": cpp, "cuda": NO_CUDA})

    def build_cpp(self) -> str:
        """Build the extension; says "ok", or why there is none."""
        try:
            import torch

            # It guesses a CUDA_HOME on import and complains about it; nothing here uses that.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            from torch.utils import cpp_extension
        except Exception as error:  # a broken torch raises anything
            return f"skipped: torch cannot be imported ({one_line(error)})"
        self.facts["torch"] = str(torch.__version__)
        if torch.__version__ < (2, 10):
            return f"skipped: torch {torch.__version__} is older than 2.10"
        compiler = shlex.split(cpp_extension.get_cxx_compiler())
        try:
            version = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
        except OSError as error:
            return f"skipped: no C++ compiler ({one_line(error)})"
        self.facts["compiler"] = version.stdout.partition("\n")[0]
        self.distribution.ext_modules = [
            cpp_extension.CppExtension(
                NAME,
                SOURCES,
                depends=HEADERS,
                py_limited_api=ABI3,
                define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
                extra_compile_args=FLAGS,
            )
        ]
        command = cpp_extension.BuildExtension(self.distribution)
        for option in ("build_lib", "build_temp", "inplace", "editable_mode", "debug", "force"):
            setattr(command, option, getattr(self, option))
        try:
            command.ensure_finalized()
            command.run()
        except Exception as error:  # distutils, ninja and PyTorch each raise their own
            return f"failed to build ({one_line(error)})"
        return "ok"

    def write_facts(self, parts: dict[str, str]) -> None:
        package = Path("clae_fast") if self.inplace else Path(self.build_lib, "clae_fast")
        package.mkdir(parents=True, exist_ok=True)
        if parts["cpp"] != "ok":
            for stale in package.glob("_C.*so"):
                stale.unlink()
        facts = {"requested": MODE, "parts": parts, **self.facts}
        facts["version"] = self.distribution.get_version()
        temporary = package / f"_build.json.{os.getpid()}"
        temporary.write_text(json.dumps(facts, indent=2) + "\n")
        os.replace(temporary, package / "_build.json")


def one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


setup(
    ext_modules=[] if MODE == "none" else [Extension(NAME, SOURCES, py_limited_api=ABI3)],
    cmdclass={"build": Build, "build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)
