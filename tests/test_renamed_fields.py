"""Field names of format version 1 are refused, with the new names."""

import dataclasses
import re
import typing

import pytest

from sam3_jax.training.config import TrainConfig
from sam3_jax.training.renamed_fields import RENAMED, check_renamed, renames

PAIRS = [(table, old, new) for table, names in RENAMED.items() for old, new in names.items()]


def fields_of(table: str) -> set[str]:
  cls = TrainConfig
  if table:
    hint = typing.get_type_hints(TrainConfig)[table]
    cls = next(x for x in (*typing.get_args(hint), hint) if dataclasses.is_dataclass(x))
  return {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize(("table", "old", "new"), PAIRS)
def test_every_old_name_is_refused_by_its_new_name(table, old, new):
  assert new in fields_of(table)
  assert old not in fields_of(table)
  values = {"checkpoint": "a"} | ({table: {old: 1}} if table else {old: 1})
  prefix = f"{table}." if table else ""
  message = f"rename {prefix}{old} to {prefix}{new} for version 2."
  with pytest.raises(ValueError, match=re.escape(message)):
    TrainConfig.from_dict(values)


def test_all_old_names_of_a_file_are_in_one_message():
  values = {"average": 0.9, "data": {"batch": 2, "seed": 1}, "optimizer": {"clip": 1.0}, "steps": 3}
  found = (
    "average to ema_decay, data.batch to data.batch_size, optimizer.clip to optimizer.max_grad"
  )
  with pytest.raises(ValueError, match=re.escape(found)) as caught:
    check_renamed(values)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [None, 3, [], {}, {"data": 3}, {"data": None, "steps": 3}])
def test_other_values_have_no_old_names(values):
  assert renames(values) == ""
  check_renamed(values)
