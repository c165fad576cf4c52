"""Builds the C++ extension; pyproject.toml holds everything else.

CLAE_FAST_BUILD=auto (the default) builds C++, and CUDA where there is nvcc, and goes on without
what fails; cpu builds C++ or fails, cuda both or fails, none nothing. TORCH_CUDA_ARCH_LIST says for
which GPUs, as it does for PyTorch's own extensions. What was built, or why not, is written to
clae_fast/_build.json.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
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
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/cuda/*.cuh"))
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))
CUDA_OPERATORS = ["csrc/cuda/ops.cpp"]
# For any processor: the kernels choose their instruction set when they run.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", f"-fmacro-prefix-map={os.getcwd()}/="]
# A100, H100, B200, RTX Blackwell; others between take the nearest image or the PTX.
ARCHITECTURES = "8.0+PTX;9.0;10.0;12.0"
NAMED_ARCHITECTURES = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX",
                       "Blackwell": "10.0;12.0+PTX"}  # fmt: skip
# A spill fails the build: these kernels live from their registers.
NVCC_FLAGS = [
    "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "--warn-on-spills",
    "-Xptxas", "-Werror",
]  # fmt: skip


class Build(build):
    # Always, so that the facts are written and a stale extension goes where nothing is built.
    sub_commands = [
        (name, None if name == "build_ext" else when) for name, when in build.sub_commands
    ]


class BuildExt(build_ext):
    """PyTorch's BuildExtension run inside, so that only a build imports torch."""

    def run(self) -> None:
        self.facts = {"compiler": None, "torch": None}
        cpp = self.why_no_cpp()
        cuda, objects, libraries = cpp or f"skipped: CLAE_FAST_BUILD={MODE}", [], []
        if cpp is None and MODE in ("auto", "cuda"):
            try:
                objects, libraries = self.build_cuda()
                cuda = "ok"
            except CudaError as error:
                cuda = str(error)
        if MODE == "cuda" and cuda != "ok":
            raise SystemExit(f"CLAE_FAST_BUILD=cuda: CUDA {cuda}")
        cpp = cpp or self.build_cpp(objects, libraries)
        if cpp != "ok":
            if MODE in ("cpu", "cuda"):
                raise SystemExit(f"CLAE_FAST_BUILD={MODE}: C++ {cpp}")
            self.extensions = []
            cuda = "skipped: the C++ part, which holds it, was not built" if cuda == "ok" else cuda
            print(f"clae_fast: C++ {cpp}")
        if cuda != "ok":
            print(f"clae_fast: CUDA {cuda}")
        self.write_facts({"cpp": cpp, "cuda": cuda})

    def why_no_cpp(self) -> str | None:
        """Why nothing can be compiled here, None if it can."""
        if MODE == "none":
            return "skipped: CLAE_FAST_BUILD=none"
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
        return None

    def build_cuda(self) -> tuple[list[str], list[str]]:
        """Compile the kernels; the object files, and what to link to.

        Raises:
            CudaError: why there are none.
        """
        root = cuda_root()
        runtime = [
            str(path)
            for folder in ("lib64", "targets/x86_64-linux/lib", "lib")
            if (path := root / folder / "libcudart_static.a").exists()
        ]
        if not runtime:
            raise CudaError(f"skipped: {root} has no libcudart_static.a")
        nvcc = [str(root / "bin" / "nvcc"), *NVCC_FLAGS, *generated_code(root)]
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        newest = max(Path(name).stat().st_mtime for name in [*HEADERS, "setup.py"])

        def compiled(source: str) -> str:
            target = folder / (Path(source).stem + ".o")
            stamp = target.with_suffix(".flags")
            flags = shlex.join(nvcc)
            fresh = target.exists() and stamp.exists() and stamp.read_text() == flags
            since = max(newest, Path(source).stat().st_mtime)
            if not fresh or target.stat().st_mtime < since or self.force:
                ran = run_nvcc(*nvcc, "-c", source, "-o", str(target))
                if ran.returncode:
                    words = [w for w in (ran.stdout + ran.stderr).splitlines() if w.strip()]
                    errors = [w for w in words if "error" in w.lower()] or words or ["nvcc failed"]
                    raise CudaError(f"failed to build ({source}: {errors[0].strip()})")
                stamp.write_text(flags)
            return str(target)

        jobs = os.environ.get("MAX_JOBS", "")
        with ThreadPoolExecutor(int(jobs) if jobs.isdigit() and int(jobs) else None) as pool:
            objects = list(pool.map(compiled, CUDA_SOURCES))
        return objects, [runtime[0], "-ldl", "-lrt", "-lpthread"]

    def build_cpp(self, objects: list[str], libraries: list[str]) -> str:
        """Build the extension around those objects; says "ok", or why there is none."""
        from torch.utils import cpp_extension

        self.distribution.ext_modules = [
            cpp_extension.CppExtension(
                NAME,
                [*SOURCES, *(CUDA_OPERATORS if objects else [])],
                depends=HEADERS,
                extra_objects=objects,
                extra_link_args=libraries,
                py_limited_api=ABI3,
                define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
                extra_compile_args=FLAGS,
            )
        ]
        command = cpp_extension.BuildExtension(self.distribution)
        for option in ("build_lib", "build_temp", "inplace", "editable_mode", "debug", "force"):
            setattr(command, option, getattr(self, option))
        command.force = True  # it looks at no object files; ninja still builds what changed only
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


class CudaError(Exception):
    """Why there are no CUDA kernels."""


def cuda_root() -> Path:
    """The toolkit's folder, from CUDA_HOME or from nvcc itself, which may be a wrapper on PATH.

    Raises:
        CudaError: there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        if not Path(home, "bin", "nvcc").exists():
            raise CudaError(f"skipped: CUDA_HOME={home} has no bin/nvcc")
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CudaError("skipped: no nvcc on PATH, and no CUDA_HOME")
    said = run_nvcc(nvcc, "--dryrun", "-x", "cu", "-E", os.devnull).stderr
    top = next((w for w in said.splitlines() if w.startswith("#$ TOP=")), None)
    if top is None:
        raise CudaError(f"skipped: {nvcc} does not say where its toolkit is")
    return Path(top.partition("=")[2]).resolve()


def run_nvcc(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CudaError(f"skipped: nvcc does not run ({one_line(error)})") from error


def generated_code(root: Path) -> list[str]:
    """nvcc's options for the architectures asked for, as PyTorch reads them; those before 8.0, for
    which there are no kernels, are left out."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    for name, numbers in NAMED_ARCHITECTURES.items():
        text = text.replace(name, numbers)
    asked = [word for word in text.replace(" ", ";").replace(",", ";").split(";") if word]
    listed = run_nvcc(str(root / "bin" / "nvcc"), "--list-gpu-code")
    known = set(listed.stdout.split())
    if listed.returncode or not known:
        raise CudaError(f"skipped: nvcc of {root} does not say which GPUs it knows")
    codes: list[tuple[str, str]] = []
    for word in asked:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if found is None:
            raise CudaError(
                f"skipped: TORCH_CUDA_ARCH_LIST has {word!r}, expected numbers such as 8.0;9.0+PTX"
            )
        major, minor, feature, ptx = found.groups()
        number = f"{major}{minor}{feature or ''}"
        if int(major) < 8:
            continue
        if f"sm_{major}{minor}" not in known:
            print(f"clae_fast: CUDA without {word}, which nvcc of {root} does not know")
            continue
        codes += [(number, f"sm_{number}"), *([(number, f"compute_{number}")] if ptx else [])]
    if not codes:
        raise CudaError(
            f"skipped: nothing in TORCH_CUDA_ARCH_LIST ({';'.join(asked)}) is 8.0 or more and "
            f"known to nvcc of {root}"
        )
    return [
        word
        for number, code in dict.fromkeys(codes)
        for word in ("-gencode", f"arch=compute_{number},code={code}")
    ]


def one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


setup(
    ext_modules=[] if MODE == "none" else [Extension(NAME, SOURCES, py_limited_api=ABI3)],
    cmdclass={"build": Build, "build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)
