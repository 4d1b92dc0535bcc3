"""tf.train.Example, the protocol buffer of a TFDS record.

TFDS has a copy of it, which is not used here: while TFDS is being imported, Python's own import is another
one (etils' lazy_imports), for all threads, and what a thread of Beam's imports meanwhile is not found.
Source: tensorflow/core/example/example.proto and feature.proto.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_PACKAGE = "tensorflow"


def _field(name: str, number: int, kind: str, **options: Any) -> FieldDescriptorProto:
    """A field of a message; `kind` is a scalar type's name or, with a capital, a message's."""
    made = FieldDescriptorProto(
        name=name, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL, **options
    )
    if kind[0].isupper():
        made.type, made.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    else:
        made.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    return made


def _many(name: str, kind: str) -> FieldDescriptorProto:
    """A message's only field, repeated."""
    made = _field(name, 1, kind)
    made.label = FieldDescriptorProto.LABEL_REPEATED
    return made


def _example() -> Any:
    lists = {"bytes_list": "BytesList", "float_list": "FloatList", "int64_list": "Int64List"}
    feature = DescriptorProto(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(lists.items(), 1):
        feature.field.append(_field(name, number, kind, oneof_index=0))
    features = DescriptorProto(name="Features", field=[_many("feature", "Features.FeatureEntry")])
    entry = features.nested_type.add(name="FeatureEntry")
    entry.field.extend([_field("key", 1, "string"), _field("value", 2, "Feature")])
    entry.options.map_entry = True
    messages = [
        DescriptorProto(name="BytesList", field=[_many("value", "bytes")]),
        DescriptorProto(name="FloatList", field=[_many("value", "float")]),
        DescriptorProto(name="Int64List", field=[_many("value", "int64")]),
        feature,
        features,
        DescriptorProto(name="Example", field=[_field("features", 1, "Features")]),
    ]
    pool = DescriptorPool()  # its own: TensorFlow puts the same names into the common one
    file = FileDescriptorProto(name="example.proto", package=_PACKAGE, syntax="proto3", message_type=messages)
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))


Example: Any = _example()
