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

# Not in the extension until they have passed on a GPU; tests/cuda_on_host builds them. On one line, which
# CMakeLists.txt does not read.
CUDA_UNPROVEN = ["conv.cu", "from_dense.cu", "k_select.cu", "pool.cu", "submanifold.cu"]
