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
    "conv.cu",
    "from_dense.cu",
    "k_select.cu",
    "pool.cu",
    "submanifold.cu",
    "to_dense.cu",
]
