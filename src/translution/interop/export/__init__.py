"""Models for other programs: traced without this library's operators, and in eight bits.

`portable` traces a model, `save_program` writes it (torch.export, ONNX, or compiled by
AOTInductor), `open_program` runs the file; `quantise` makes its weights int8.
"""

from .files import KINDS, open_program, save_program
from .programs import Difference, difference, example, portable
from .quantization import quantise, stored_bytes

__all__ = [
    "KINDS",
    "Difference",
    "difference",
    "example",
    "open_program",
    "portable",
    "quantise",
    "save_program",
    "stored_bytes",
]
