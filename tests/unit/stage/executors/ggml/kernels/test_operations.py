"""ggml's own operations give a row the same bits in any company, as a slice uses them (ADR 37)."""

import ast
from pathlib import Path

import numpy as np
import pytest

from noodle.model.ggml_types import GGML_TYPES
from services.stage.executors.ggml import layers
from services.stage.executors.ggml.kernels.products import BLOCK_TYPES, FLOAT_TYPES
from tests.support.stages.ggml_operation import Graph, stored_as

WIDTH = 200  # of a row: whole vectors of any instructions, and a rest
HEADS, HEAD_DIM = 4, 50
MOST_ROWS = 70
# computed by noodle's kernels, or moving bytes alone
OTHERS = {"flash_attn_ext", "mul_mat_id", "add_id", "mul_mat", "reshape_2d", "reshape_3d", "permute", "new_tensor_2d"}
OTHERS |= {"new_tensor_3d", "view_1d", "view_2d", "view_3d"}

# types that noodle has no kernels for
LEFT_TO_GGML = ("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0")
LEFT_TO_GGML += ("NVFP4", "Q1_0")


class Operands:
    """What an operation takes beside its rows, the same for every row."""

    def __init__(self, graph, rows):
        self.graph, self.ggml, self.context = graph, graph.ggml, graph.memory.context
        self.count = len(rows)
        self.rows = graph.input(rows)
        self._random = np.random.default_rng(3)

    def call(self, name, *arguments):
        return getattr(self.ggml, f"ggml_{name}")(self.context, *arguments)

    def same(self, *shape):
        """The same random numbers each time."""
        return self.graph.input(self._random.standard_normal(shape).astype(np.float32))

    def heads(self):
        return self.call("reshape_3d", self.rows, HEAD_DIM, HEADS, self.count)

    def numbers(self):
        """One number for each row, from the row itself."""
        return self.call("cont", self.call("view_2d", self.rows, 1, self.count, 4 * WIDTH, 0))

    def halves(self):
        first, second = (self.call("view_2d", self.rows, WIDTH // 2, self.count, 4 * WIDTH, at) for at in (0, 400))
        return self.call("cont", first), second

    def chosen(self):
        return self.call("argsort_top_k", self.rows, 8)

    def taken(self):
        scores = self.call("reshape_3d", self.rows, 1, WIDTH, self.count)
        return self.call("reshape_2d", self.call("get_rows", scores, self.chosen()), 8, self.count)

    def rotated(self, pairing, dimensions):
        """By positions that a row carries with it, as its first number."""
        positions = self.call("cast", self.call("abs", self.call("scale", self.numbers(), 900.0)), 26)
        positions = self.call("reshape_1d", positions, self.count)
        factors = self.same(HEAD_DIM // 2)
        frequencies = (0, 1.0, 1.0, 0.0, 1.3, 32.0, 1.0)
        return self.call("rope_ext", self.heads(), positions, factors, dimensions, pairing, *frequencies)


def unary(name, *numbers):
    return lambda at: at.call(name, at.rows, *numbers)


def gated(name, *numbers):
    return lambda at: at.call(name, *at.halves(), *numbers)


OPERATIONS = {
    **{
        name: unary(name)
        for name in ("abs", "cont", "exp", "gelu", "gelu_erf", "neg", "relu", "sigmoid", "silu", "soft_max", "sqr")
    },
    **{name: unary(name) for name in ("step", "sum_rows", "tanh", "swiglu", "geglu", "geglu_erf")},
    "rms_norm": unary("rms_norm", 1e-5),
    "norm": unary("norm", 1e-5),
    "rms_norm of heads": lambda at: at.call("rms_norm", at.heads(), 1e-5),
    "scale": unary("scale", 0.3),
    "scale_bias": unary("scale_bias", 0.3, 0.7),
    "clamp": unary("clamp", -0.5, 0.5),
    "xielu": unary("xielu", 0.8, 0.7, 0.5, -1e-6),
    "swiglu_split": gated("swiglu_split"),
    "geglu_split": gated("geglu_split"),
    "geglu_erf_split": gated("geglu_erf_split"),
    "swiglu_oai": gated("swiglu_oai", 1.702, 1.0),
    **{name: (lambda at, name=name: at.call(name, at.rows, at.same(WIDTH))) for name in ("add", "sub", "mul", "div")},
    **{
        f"{name} of a row's number": (lambda at, name=name: at.call(name, at.rows, at.numbers()))
        for name in ("add", "sub", "mul", "div")
    },
    "concat": lambda at: at.call("concat", *at.halves(), 0),
    "cont_2d": lambda at: at.call("cont_2d", at.heads(), WIDTH, at.count),
    "pad": lambda at: at.call("pad", at.rows, 8, 0, 0, 0),
    "argsort_top_k": lambda at: at.call("cont", at.chosen()),
    "get_rows": lambda at: at.taken(),
    "soft_max of few": lambda at: at.call("soft_max", at.taken()),
    "rope_ext of halves": lambda at: at.rotated(2, HEAD_DIM),
    "rope_ext of neighbours": lambda at: at.rotated(0, HEAD_DIM),
    "rope_ext of a part": lambda at: at.rotated(2, 32),
}


def random_rows(length=WIDTH):
    return np.random.default_rng(1).standard_normal((MOST_ROWS, length)).astype(np.float32)


def computed(ggml, build, batches, threads):
    """The bytes of each row's result in each batch; all batches are parts of one graph."""
    graph = Graph(ggml, threads, 64 + 16 * len(batches))
    results = []
    for rows in batches:
        tensor = build(Operands(graph, rows))
        results.append((tensor, (len(rows), ggml.ggml_nbytes(tensor) // 4 // len(rows))))
    return [found.view(np.uint32) for found in graph.compute_all(results)]


def check_in_any_company(ggml, build, rows):
    """For all numbers of rows; a row has another place each time."""
    alone = np.concatenate(computed(ggml, build, [rows[[row]] for row in range(MOST_ROWS)], 1))
    assert len(np.unique(alone, axis=0)) > 1
    firsts = range(MOST_ROWS - 1, -1, -1)
    for threads in (1, 2, 5):
        found = computed(ggml, build, [rows[first:] for first in firsts], threads)
        for first, each in zip(firsts, found, strict=True):
            np.testing.assert_array_equal(each, alone[first:], err_msg=f"{MOST_ROWS - first} rows, {threads} threads")


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_of_ggml_gives_a_row_the_same_bits_in_any_company(name, ggml):
    check_in_any_company(ggml, OPERATIONS[name], random_rows())


@pytest.mark.parametrize("kind", ["f16", "q8_0", "f32"])
def test_a_row_is_written_into_the_cache_with_the_same_bits_in_any_company(kind, ggml):
    def copied(at):
        target = at.call("new_tensor_2d", GGML_TYPES[kind.upper()].number, 192, at.count)
        source = at.call("view_2d", at.rows, 192, at.count, 4 * WIDTH, 0)
        return at.call("cpy", source, target)

    check_in_any_company(ggml, copied, random_rows())


def stored_in(ggml, kind, shape):
    """Random numbers as ggml stores them in a type; blocks of the types with codebooks are any bytes beside a scale."""
    random, type_ = np.random.default_rng(2), GGML_TYPES[kind]
    if kind.startswith("IQ"):
        blocks = random.integers(0, 256, (np.prod(shape) // type_.block_items, type_.block_bytes), np.uint8)
        if kind == "IQ1_M":  # its scale is in the upper bits of its last four words
            blocks[:, -1] = blocks[:, -1] & 0x0F | 0x20
        else:
            blocks[:, :2] = np.array([0.07], np.float16).view(np.uint8)
        return blocks.reshape(-1)
    rows = random.standard_normal((np.prod(shape[:-1]), shape[-1])).astype(np.float32)
    return stored_as(ggml, kind, rows)[0]


@pytest.mark.parametrize("kind", LEFT_TO_GGML)
def test_a_product_with_a_type_that_is_left_to_ggml_gives_a_row_the_same_bits_in_any_company(kind, ggml):
    stored = stored_in(ggml, kind, (5, 512))

    def product(at):
        return at.call("mul_mat", at.graph.stored(kind, stored, 512, 5), at.rows)

    check_in_any_company(ggml, product, random_rows(512))


@pytest.mark.parametrize("kind", FLOAT_TYPES + BLOCK_TYPES[:5])
def test_a_product_of_each_head_gives_a_row_the_same_bits_in_any_company(kind, ggml):
    """As latent attention has them: a matrix of each head, and rows whose heads lie side by side."""
    heads, length, outputs = 3, 64, 37
    stored = stored_in(ggml, kind, (heads, outputs, length))

    def product(at):
        by_head = at.call("permute", at.call("reshape_3d", at.rows, length, heads, at.count), 0, 2, 1, 3)
        products = at.call("mul_mat", at.graph.stored(kind, stored, length, outputs, heads), by_head)
        return at.call("cont_2d", at.call("permute", products, 0, 2, 1, 3), heads * outputs, at.count)

    check_in_any_company(ggml, product, random_rows(heads * length))


def test_every_operation_that_layers_use_is_among_these(ggml):
    """By the names that stand in the layers' files."""
    names = set()
    for path in Path(layers.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    used = {name for name in names if name.isidentifier() and hasattr(ggml, f"ggml_{name}")}
    tested = {name.partition(" ")[0] for name in OPERATIONS} | {"cpy"}
    assert used - tested - OTHERS == set()
