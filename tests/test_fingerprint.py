"""Fingerprints: equal for equal content in every process, different for different content."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch

from cove.fingerprint import fingerprint
from tests.method_helpers import DEVICES, fresh, randn


@dataclass
class Pair:
    left: object
    right: object = None


@dataclass
class Couple:
    left: object
    right: object = None


@dataclass
class Other:
    left: object
    wrong: object = None


def content():
    """Return nested content of every kind."""
    return {
        "tensors": [randn(3, 5, 7), randn(5, 7, dtype=torch.bfloat16), torch.arange(3), torch.tensor(True)],
        "plain": (1, 1.5, True, None, "Fuß", b"\x00\xff", float("inf")),
        3: {"pair": Pair(randn(2, 3), {"deep": [Pair(1, 2)]})},
    }


def test_fingerprint_of_equal_content_is_equal():
    assert fingerprint(content()) == fingerprint(content())
    assert len(fingerprint()) == 64 and int(fingerprint(), 16) >= 0


def test_fingerprint_is_equal_in_another_process():
    """String hashes, and hence the order of sets, differ between processes."""
    code = "import json; from tests.test_fingerprint import *; print(json.dumps(fingerprint(content())))"
    assert fresh(code) == fingerprint(content())


A = torch.arange(6, dtype=torch.int32)
NAN = float("nan")
DIFFERENT = {
    "nothing": (),
    "tensor": (A,),
    "another dtype, the same bytes": (A.view(torch.float32),),
    "another dtype, the same values": (A.long(),),
    "two axes": (A.view(2, 3),),
    "the axes turned, the same bytes": (A.view(3, 2),),
    "an axis of 1": (A.view(6, 1),),
    "one value": (torch.tensor([0, 1, 2, 3, 4, 6], dtype=torch.int32),),
    "order of values": (A.flip(0),),
    "values as a sequence": (A.tolist(),),
    "no values": (A[:0],),
    "no values, two axes": (A[:0].view(0, 2),),
    "scalar tensor": (torch.tensor(1),),
    "int": (1,),
    "negative": (-1,),
    "bool": (True,),
    "float": (1.0,),
    "the next float": (1.0000000000000002,),
    "negative zero": (-0.0,),
    "zero": (0.0,),
    "int zero": (0,),
    "False": (False,),
    "NaN": (NAN,),
    "str of int": ("1",),
    "bytes of int": (b"1",),
    "str of bool": ("True",),
    "None": (None,),
    "str of None": ("None",),
    "empty str": ("",),
    "space": (" ",),
    "empty bytes": (b"",),
    "two things": (1, 2),
    "two things in another order": (2, 1),
    "one sequence": ([1, 2],),
    "two in two": ([1], [2]),
    "one in one": ([1], 2),
    "the other in one": (1, [2]),
    "sequence in a sequence": ([[1, 2]],),
    "empty sequence": ([],),
    "two empty sequences": ([], []),
    "empty sequence in a sequence": ([[]],),
    "empty mapping": ({},),
    "mapping": ({"a": 1, "b": 2},),
    "another key": ({"a": 1, "c": 2},),
    "another value": ({"a": 1, "b": 3},),
    "values exchanged": ({"a": 2, "b": 1},),
    "fewer": ({"a": 1},),
    "key of another kind": ({1: 1},),
    "key as str": ({"1": 1},),
    "None as value": ({"a": 1, "b": None},),
    "mapping as a sequence": (["a", 1, "b", 2],),
    "mapping as pairs": ([("a", 1), ("b", 2)],),
    "deeper": ({"a": {"b": 1, "c": 2}},),
    "less deep": ({"a": {"b": 1}, "c": 2},),
    "one str": ("ab",),
    "two strs": ("a", "b"),
    "a str that looks like two": ("a str 3 'b'",),
    "quotes that look like two": ("a' str 3 'b",),
    "dataclass": (Pair(1, 2),),
    "dataclass, other values": (Pair(2, 1),),
    "dataclass, values of another kind": (Pair("1", 2),),
    "another dataclass": (Couple(1, 2),),
    "another field": (Other(1, 2),),
    "its content": ({"left": 1, "right": 2},),
    "two dataclasses": (Pair(1, 2), Pair(1, 2)),
    "dataclass in a dataclass": (Pair(Pair(1, 2)),),
}


def test_fingerprint_distinguishes_small_changes():
    seen = {}
    for name, things in DIFFERENT.items():
        assert seen.setdefault(fingerprint(*things), name) == name


def test_fingerprint_ignores_the_order_of_a_mapping():
    one = {"b": 1, "a": {"d": A, "c": 2}, 3: 4}
    other = OrderedDict([(3, 4), ("a", {"c": 2, "d": A}), ("b", 1)])
    assert fingerprint(one) == fingerprint(other)


def test_fingerprint_treats_list_and_tuple_alike():
    assert fingerprint([1, (2, 3)]) == fingerprint((1, [2, 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("device", DEVICES)
def test_fingerprint_ignores_strides_and_device_of_a_tensor(dtype, device):
    tensor, row = ((randn(n, 5, 7) * 4).clamp(min=0).to(dtype) for n in (3, 1))
    expected = fingerprint(tensor)
    strided = tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous() and torch.equal(strided, tensor)
    part = torch.cat((tensor, tensor))[3:]
    assert fingerprint(strided.to(device)) == fingerprint(part.to(device)) == expected
    assert fingerprint(torch.arange(0, 14, 2).to(dtype)) == fingerprint(torch.arange(14).to(dtype)[::2])
    assert fingerprint(row.expand(3, 5, 7)) == fingerprint(row.repeat(3, 1, 1)) != expected


def test_fingerprint_of_a_tensor_with_gradient_depends_on_values_only():
    assert fingerprint(randn(3, 5).requires_grad_()) == fingerprint(torch.nn.Parameter(randn(3, 5)))
    assert fingerprint(torch.nn.Parameter(randn(3, 5))) == fingerprint(randn(3, 5))


class Unknown:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("thing", [Unknown(1), object, Pair, {1, 2}, 1j, range(3), len])
@pytest.mark.parametrize("nested", [lambda thing: thing, lambda thing: {"a": [1, Pair(thing)]}])
def test_fingerprint_refuses_objects_of_unknown_content(thing, nested):
    with pytest.raises(TypeError, match=f"{type(thing).__qualname__} is not known"):
        fingerprint(nested(thing))


def value_of(thing):
    return {"value": thing.value}


def test_fingerprint_reads_other_objects_with_known():
    asked, unknown = [], Unknown([A, 2])

    def known(thing):
        asked.append(thing)
        return value_of(thing)

    def found(thing, known=value_of):
        return fingerprint({"a": [1, Pair(thing)], "b": content()}, known=known)

    assert found(unknown, known) == found(Unknown([A, 2]))
    assert asked == [unknown]  # `known` is called for unknown objects only
    assert len({found(thing) for thing in (unknown, Unknown([A, 3]), Unknown([A]), {"value": [A, 2]}, None)}) == 5


def test_fingerprint_reads_nested_results_of_known():
    nested = [Unknown(5), Unknown(Unknown(5)), Unknown({"a": Unknown(5)}), Unknown({"a": Unknown(6)})]
    assert len({fingerprint(thing, known=value_of) for thing in nested}) == len(nested)
    assert fingerprint(Unknown(Unknown(5)), known=value_of) == fingerprint(nested[1], known=value_of)
    with pytest.raises(TypeError, match="complex is not known"):
        fingerprint(Unknown(1j), known=lambda thing: None if not hasattr(thing, "value") else fingerprint(thing.value))


def ring(*values):
    """Return the first of some objects of which each holds the next, and the last the first."""
    things = [Unknown([value]) for value in values]
    for thing, after in zip(things, things[1:] + things[:1], strict=True):
        thing.value.append(after)
    return things[0]


def test_fingerprint_reads_cyclic_objects_once():
    rings = [ring(1), ring(1, 1), ring(1, 2), ring(2, 1), ring(1, 2, 3)]
    assert len({fingerprint(thing, known=value_of) for thing in rings}) == len(rings)
    assert fingerprint(ring(1, 2, 3), known=value_of) == fingerprint(rings[-1], known=value_of)
    many = Unknown(1)
    for _ in range(100):  # 2**100 paths; only visited objects make this finish
        many = Unknown([many, many])
    assert len(fingerprint(many, known=value_of)) == 64


class Named(dict):
    pass


def test_fingerprint_includes_attributes_of_a_container():
    def known(thing):
        return dict(thing), vars(thing)

    one, other = Named(a=1), Named(a=1)
    assert fingerprint(one, known=known) == fingerprint(other, known=known)
    one.strength, other.strength = 1, 2
    assert fingerprint(one, known=known) != fingerprint(other, known=known)


def test_fingerprint_sorts_object_keys_by_content():
    def table(values):
        return {Unknown(value): value for value in values}

    assert fingerprint(table([1, 2, 3]), known=value_of) == fingerprint(table([3, 1, 2]), known=value_of)
    assert fingerprint(table([1, 2, 3]), known=value_of) != fingerprint(table([1, 2, 4]), known=value_of)
