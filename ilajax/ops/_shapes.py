"""Annotations with shapes, such as Float[Array, "b c k"]: jaxtyping's, where it is installed.

They are checked while tests run (tests/conftest.py), and are comments for everybody else. The letters:
b samples, c channels, ck channels of keys (1: a shared support), i input channels, o output channels,
k slots, q slots of the output, n weights, t taps.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Float32
    from typing import Annotated as Int32

    from jax import Array
else:
    Array = Any  # of JAX or NumPy: what has a shape and a dtype
    try:
        from jaxtyping import Bool, Float, Float32, Int32
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, _: object) -> object:
                return Any

        Bool = Float = Float32 = Int32 = _Unchecked

__all__ = ["Array", "Bool", "Float", "Float32", "Int32"]
