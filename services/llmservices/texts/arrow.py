"""Between Arrow's columns and numpy's arrays without a copy.

Not by pyarrow's own conversions: they import pandas, half a second of every process.  Columns here
have no nulls.
"""

from typing import Any  # pyarrow has no types

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def to_numpy(column: Any, kind: type[np.generic]) -> npt.NDArray[Any]:
    """A view of a column of numbers of this kind."""
    width = np.dtype(kind).itemsize
    data = column.buffers()[1]
    if data is None or not len(column):
        return np.empty(0, kind)
    return np.frombuffer(data, kind, count=len(column), offset=column.offset * width)


def to_arrow(array: npt.NDArray[Any], kind: Any) -> Any:
    """A column over an array's memory; `kind` is Arrow's type of the same numbers."""
    data = pa.py_buffer(np.ascontiguousarray(array))
    return pa.Array.from_buffers(kind, len(array), [None, data])
