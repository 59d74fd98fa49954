# SPDX-License-Identifier: Apache-2.0
"""A digest of what a compiled TPU program is, not of where it was compiled.

The compiler's text also tells where things come from: tables of source files, the place of every
instruction, and, inside the bytecode of each Mosaic kernel, paths and lines of all files that the
kernel was traced through. These follow the folder of the checkout and of the environment, so a
digest of the text as it stands is another one on another machine. Names are what the compiler
made of the names of functions, and its estimates of time are guesses about the program. All of it
is left out: what counts is instructions, shapes, layouts, order and settings, in kernels too.
"""

import base64
import hashlib
import re

from jax.experimental.mosaic.dialects import tpu
from jax.extend.mlir import ir

# Tables before the first computation; a computation starts with its name.
_TABLES = re.compile(
    r"^(?:FileNames|FunctionNames|FileLocations|StackFrames)$.*?(?=^[%E])", re.M | re.S
)
_METADATA = re.compile(r', metadata=\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\}')
_ESTIMATE = re.compile(r'"(?:ml_)?estimated_\w+":"[^"]*",?')
_KERNEL = re.compile(r'"body":"([A-Za-z0-9+/=]+)"')
_NAME = re.compile(r"%[\w.-]+")
_MODULE = re.compile(r"^HloModule [\w.-]+")


def of_text(text: str) -> str:
    """Digest of the text of a compiled program."""
    return hashlib.sha256(canonical(text).encode()).hexdigest()[:16]


def canonical(text: str) -> str:
    """The text with kernels spelled out, without places, names and estimates."""
    text = _TABLES.sub("", _MODULE.sub("HloModule", text))
    text = _ESTIMATE.sub("", _METADATA.sub("", text))
    return _renamed(_KERNEL.sub(lambda found: f'"body":"{kernel(found[1])}"', text))


def kernel(body: str) -> str:
    """Digest of a Mosaic kernel without the places that its bytecode remembers.

    Bytecode that this version of JAX cannot read counts as it stands.

    Args:
      body: the bytecode in base 64.
    """
    code = base64.b64decode(body)
    context = ir.Context()
    # Kernels travel in a dialect of stable names that no library registers.
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    try:
        with context:
            operation = ir.Module.parse(code).operation
            code = operation.get_asm(enable_debug_info=False).encode()
    except ir.MLIRError:
        pass
    return hashlib.sha256(code).hexdigest()


def _renamed(text: str) -> str:
    """Names replaced by numbers in order of appearance, in attributes that quote them too."""
    numbers: dict[str, str] = {}
    text = _NAME.sub(lambda name: numbers.setdefault(name[0], f"%{len(numbers)}"), text)
    return re.sub(r'"([\w.-]+)"', lambda said: f'"{numbers.get("%" + said[1], said[1])}"', text)
