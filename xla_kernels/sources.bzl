"""The one list of sources: loaded by Bazel's BUILD and read line by line by CMakeLists.txt."""

CPU_SOURCES = [
    "conv.cc",
    "from_dense.cc",
    "k_select.cc",
    "pool.cc",
    "submanifold.cc",
    "to_dense.cc",
]

CUDA_SOURCES = [
    "to_dense.cu",
]

# Not in the extension until they have passed on a GPU, which `make gpu-check` finds out: it builds with
# ILAJAX_CUDA_UNPROVEN=ON. tests/cuda_on_host builds them too. On one line, by which CMakeLists.txt knows them.
CUDA_UNPROVEN = ["conv.cu", "from_dense.cu", "k_select.cu", "pool.cu", "submanifold.cu"]
