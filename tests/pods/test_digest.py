# SPDX-License-Identifier: Apache-2.0
"""The digest of a compiled program: the same wherever it was compiled, another for another one.

Once the places inside kernels were part of it, and every checkout had digests of its own.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from test_kernels import shape

from flexolmo_jax.pods import digest

TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0:T(128)})->f32[8]{0}}

FileNames
1 "/home/a/step.py"

FunctionNames
1 "step"

%inner (param_0: f32[8]) -> f32[8] {
  ROOT %tanh.3 = f32[8]{0} tanh(%param_0), metadata={op_name="jit(f)/{x}" stack_frame_id=4}
}

ENTRY %main.5 (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %gather.7 = f32[8]{0} all-gather(%x.1), frontend_attributes={name="gather.7"}
  ROOT %step.2 = f32[8]{0} fusion(%gather.7), calls=%inner, metadata={op_name="jit(f)"}, \
backend_config={"window_config":{"estimated_cycles":"70","bounds":["1"]}}
}
"""
# A function that calls a kernel, to be placed in any file at any line.
SOURCE = """
def kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...] * {factor}

def {name}(x):
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x) + 1
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/home/a/step.py", "/srv/b/step.py"),
        ("stack_frame_id=4", "stack_frame_id=9"),
        ("jit(f)/{x}", "jit(g)/{y}"),
        ("jit_step", "jit_other"),
        ("gather.7", "gather.12"),
        ("%inner", "%outer.1"),
        ('"estimated_cycles":"70"', '"estimated_cycles":"71"'),
    ],
)
def test_places_names_and_estimates_do_not_count(before, after):
    changed = TEXT.replace(before, after)
    assert changed != TEXT
    assert digest.of_text(changed) == digest.of_text(TEXT)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tanh(", "cosine("),
        ("f32[8]{0} all-gather", "f32[8]{0:T(128)} all-gather"),
        ("fusion(%gather.7)", "fusion(%x.1)"),
        ('"bounds":["1"]', '"bounds":["2"]'),
        ("is_scheduled=true", "is_scheduled=false"),
        ("T(128)})->", "T(256)})->"),
    ],
)
def test_what_the_program_is_counts(before, after):
    changed = TEXT.replace(before, after)
    assert changed != TEXT
    assert digest.of_text(changed) != digest.of_text(TEXT)


def compiled(path: str, line: int, *, factor: float = 2.0, name: str = "f") -> str:
    """The text of a program with a kernel whose source lies at a place."""
    names = {"pl": pl, "jax": jax}
    source = "\n" * line + SOURCE.format(factor=factor, name=name)
    exec(compile(source, path, "exec"), names)
    x = shape("v5e:2x2", 256, 256, dtype=jnp.float32)
    return jax.jit(names[name]).lower(x).compile().as_text()


def kernels(text: str) -> list[str]:
    return re.findall(r'"body":"([A-Za-z0-9+/=]+)"', text)


def test_a_kernel_is_the_same_wherever_its_source_lies():
    here, there = compiled("/home/a/f.py", 1), compiled("/srv/elsewhere/g.py", 40)
    assert len(kernels(here)) == 1 and kernels(here) != kernels(there)
    renamed = compiled("/home/a/f.py", 1, name="other")
    assert digest.of_text(here) == digest.of_text(there) == digest.of_text(renamed)


def test_another_kernel_is_another_program():
    assert digest.of_text(compiled("/home/a/f.py", 1)) != digest.of_text(
        compiled("/home/a/f.py", 1, factor=3.0)
    )


def test_bytecode_that_cannot_be_read_counts_as_it_stands():
    assert digest.kernel("AAAA") != digest.kernel("AAAB")


def test_a_program_is_the_same_on_other_lines():
    def first(a):
        return jnp.tanh(a @ a)

    def again(a):
        b = a @ a
        return jnp.tanh(b)

    def other(a):
        return jnp.sin(a @ a)

    x = shape("v5e:2x2", 512, 512, dtype=jnp.float32)
    one, two, three = (
        digest.of_text(jax.jit(f).lower(x).compile().as_text()) for f in (first, again, other)
    )
    assert one == two != three
