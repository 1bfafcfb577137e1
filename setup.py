"""Builds seqkern._C: one extension on LibTorch's stable ABI, with the CPU kernels compiled once per instruction set.

Environment: SEQKERN_CUDA = 0 | 1 | auto (default): CUDA sources join where a toolkit and a CUDA build of torch are.
TORCH_CUDA_ARCH_LIST, as in "8.0;9.0;12.0+PTX": what for; default: the GPUs present, or these three where there is none.
MAX_JOBS: compilers at once.
SEQKERN_BUILD_ISAS: instruction sets to build the CPU kernels for, as in "avx2 avx512"; default: all. generic always is.
"""

import glob
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension

ROOT = os.path.dirname(os.path.abspath(__file__))
VERSION = "0.1.0"
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")
# 2.11 is the oldest torch that the wheel runs on, whatever it is built with.
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000"] + (["-DPy_LIMITED_API=0x030A0000"] if ABI3 else [])
CXX = ["-std=c++20", "-O3", "-g0", "-Wall", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="]
NVCC = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
KERNELS = ["-ffp-contract=fast", "-fno-exceptions", "-fno-rtti", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
ISA = {"generic": ["-DSK_VEC_BYTES=16"]}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = avx2 + ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mprefer-vector-width=512"]
    ISA["avx2"] = avx2 + ["-DSK_VEC_BYTES=32"]
    ISA["avx512"] = avx512 + ["-DSK_VEC_BYTES=64"]
    ISA["avx512_bf16"] = avx512 + ["-mavx512bf16", "-DSK_BF16_DOT", "-DSK_VEC_BYTES=64"]
    ISA["amx"] = avx512 + ["-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DSK_AMX", "-DSK_VEC_BYTES=64"]
if os.environ.get("SEQKERN_BUILD_ISAS"):
    wanted = os.environ["SEQKERN_BUILD_ISAS"].split()
    if set(wanted) - set(ISA):
        sys.exit(f"seqkern: SEQKERN_BUILD_ISAS must name some of {' '.join(ISA)}, got {' '.join(wanted)}")
    ISA = {isa: flags for isa, flags in ISA.items() if isa in (*wanted, "generic")}
STABLE += [f"-DSK_ISA_{isa.upper()}" for isa in ISA]


def sources(pattern):
    return sorted(os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, pattern), recursive=True))


def csrc_hash():
    """What identifies the kernels in benchmark results: a hash over the names and contents of csrc/."""
    digest = hashlib.sha256()
    for path in sources("csrc/**/*.*"):
        digest.update(path.encode())
        with open(os.path.join(ROOT, path), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:12]


def cuda_archs():
    """As "9.0" or "12.0+PTX"."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    there = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    return wanted or sorted(there, key=float) or ["8.0", "9.0", "12.0+PTX"]


def arch_flags(archs):
    flags = []
    for arch in archs:
        number, _, ptx = arch.partition("+")
        number = number.replace(".", "")
        if not number.rstrip("af").isdigit() or ptx not in ("", "PTX"):
            sys.exit(f'seqkern: TORCH_CUDA_ARCH_LIST must be like "8.0;9.0;12.0+PTX", got {arch!r}')
        flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code=compute_{number}"] * bool(ptx)
    return flags


def build_info(cuda):
    archs = " ".join(cuda_archs()) if cuda else ""
    return {"version": VERSION, "csrc": csrc_hash(), "torch": torch.__version__, "cuda_archs": archs}


def with_cuda():
    wanted = os.environ.get("SEQKERN_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"seqkern: SEQKERN_CUDA must be 0, 1 or auto, got {wanted!r}")
    there = torch.version.cuda is not None and CUDA_HOME is not None and bool(sources("csrc/cuda/*.cu"))
    if wanted == "1" and not there:
        sys.exit(
            "seqkern: SEQKERN_CUDA=1 needs a CUDA build of torch, a CUDA toolkit (CUDA_HOME) and CUDA sources; found "
            f"torch {torch.__version__}, CUDA_HOME={CUDA_HOME}, {len(sources('csrc/cuda/*.cu'))} CUDA sources"
        )
    return there and wanted != "0"


def check_compiler():
    compiler = (os.environ.get("CXX") or "c++").split()[-1]
    if shutil.which(compiler) is None:
        sys.exit(f"seqkern: building needs a C++20 compiler, and {compiler!r} was not found; install g++ or set CXX")
    probe = "int main() { return 0; }"
    run = subprocess.run(
        [compiler, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"],
        input=probe,
        text=True,
        capture_output=True,
        check=False,
    )
    if run.returncode:
        sys.exit(f"seqkern: building needs a C++20 compiler, and {compiler!r} is not one: {run.stderr.strip()}")


def compile_cuda(source):
    """One .cu file to an object, with every architecture in it; not again unless a source is newer."""
    target = os.path.join(ROOT, "build", "cuda", os.path.basename(source) + ".o")
    command = [os.path.join(CUDA_HOME, "bin", "nvcc"), *NVCC, *arch_flags(cuda_archs()), "-c", source, "-o", target]
    stamp, line = target + ".command", " ".join(command)
    read = [source, *sources("csrc/core/*.h"), *sources("csrc/cuda/*.*h")]
    newest = max(os.path.getmtime(os.path.join(ROOT, path)) for path in read)
    if os.path.exists(target) and os.path.exists(stamp) and os.path.getmtime(target) > newest:
        with open(stamp) as file:
            if file.read() == line:
                return target
    os.makedirs(os.path.dirname(target), exist_ok=True)
    print(line, flush=True)
    run = subprocess.run(command, cwd=ROOT, check=False)
    if run.returncode:
        sys.exit(f"seqkern: nvcc failed on {source}")
    with open(stamp, "w") as file:
        file.write(line)
    return target


def cuda_runtime():
    """The CUDA runtime goes into the extension: it then loads where there is none, and agrees with every torch."""
    folders = [os.path.join(CUDA_HOME, part) for part in ("lib64", "lib", "targets/x86_64-linux/lib")]
    found = [os.path.join(folder, "libcudart_static.a") for folder in folders]
    found = [path for path in found if os.path.exists(path)]
    if not found:
        sys.exit(f"seqkern: libcudart_static.a was not found in any of {', '.join(folders)}")
    return found[0]


class Build(BuildExtension):
    """Compiles the CPU kernels once per ISA and the CUDA kernels, none of which know torch, and links them in."""

    def build_extension(self, ext):
        check_compiler()

        def compile_for(job):
            isa, source = job
            name = os.path.basename(source).removesuffix(".cpp")
            return self.compiler.compile(
                [os.path.join(ROOT, source)],
                output_dir=os.path.join(ROOT, "build", "isa", isa, name),  # a fixed place: tests look at the symbols
                extra_postargs={"cxx": CXX + KERNELS + ISA[isa] + [f"-DSK_NS={isa}"]},
                depends=ext.depends,
            )

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count())
        with ThreadPoolExecutor(jobs) as pool:  # each is one long compilation
            cuda_objects = pool.map(compile_cuda, sources("csrc/cuda/*.cu") if cuda else [])
            for objects in pool.map(compile_for, itertools.product(ISA, sources("csrc/cpu/*kernels.cpp"))):
                ext.extra_objects += objects
            ext.extra_objects += cuda_objects
        if cuda:
            ext.extra_objects.append(cuda_runtime())
        super().build_extension(ext)


cuda = with_cuda()
extension = CppExtension(
    "seqkern._C",
    [
        "csrc/library.cpp",
        "csrc/inference.cpp",
        "csrc/training.cpp",
        "csrc/cpu/dispatch.cpp",
        *sources("csrc/cpu/*ops.cpp"),
    ]
    + ["csrc/cuda/ops.cpp"] * cuda,
    define_macros=[("SK_BUILD_INFO", json.dumps(json.dumps(build_info(cuda))))],
    extra_compile_args={"cxx": CXX + STABLE},
    libraries=["dl", "rt", "pthread"] if cuda else [],
    depends=sources("csrc/**/*.*"),
    py_limited_api=ABI3,
)

setup(
    version=VERSION,
    cmdclass={"build_ext": Build},
    ext_modules=[extension],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)
