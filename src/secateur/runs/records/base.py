"""The base of every schema, with one way to write a file and one way to read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator

from secateur.errors import CheckpointError


class Record(BaseModel):
    """A file, or a part of one. A misspelled key is an error when a record is made."""

    model_config = ConfigDict(
        frozen=True,
        protected_namespaces=(),
        extra="forbid",
        populate_by_name=True,
        ser_json_inf_nan="constants",
    )

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return self.model_dump(mode="json", by_alias=True)


class PartialRecord(Record):
    """A record of which only the given keys are written, in the order in which they were given."""

    @model_validator(mode="wrap")
    @classmethod
    def _keep_order(cls, values: Any, make: Any) -> Any:
        record = make(values)
        if isinstance(values, Mapping):
            fields = record.__dict__
            given = {name: fields[name] for name in values if name in fields}
            object.__setattr__(record, "__dict__", {**given, **fields})
        return record

    @model_serializer(mode="wrap")
    def _given_keys(self, write: Any) -> dict[str, Any]:
        given = self.model_fields_set
        return {name: value for name, value in write(self).items() if name in given}


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(record: type[AnyRecord], file: Path) -> AnyRecord:
    """Read a JSON file and check its schema.

    Raises:
        CheckpointError: the file cannot be read, is no JSON, or has another schema; names the file.
    """
    try:
        return parsed(record, file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"the file cannot be read: {error}", where=str(file), remedy="make it again"
        ) from error


def read_list(record: type[AnyRecord], file: Path) -> list[AnyRecord]:
    """Read a JSON file that holds a list of records.

    Raises:
        CheckpointError: it cannot be read, is no list, or an entry has another schema.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise ValueError("the file holds no list")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the file cannot be read: {error}", where=str(file), remedy="make it again"
        ) from error
    return [parsed(record, json.dumps(entry), f"{file}:{n}") for n, entry in enumerate(entries, 1)]


def parsed(record: type[AnyRecord], text: str, where: str) -> AnyRecord:
    """Parse a JSON text and check its schema.

    Raises:
        CheckpointError: the text is no JSON, or has another schema.
    """
    try:
        return record.model_validate(json.loads(text), extra="ignore")  # of newer releases
    except ValidationError as error:
        faults = [
            f"{'.'.join(str(part) for part in fault['loc']) or 'all of it'}: {fault['msg']}"
            for fault in error.errors()[:3]
        ]
        raise CheckpointError(
            f"not what this release expects there: {'; '.join(faults)}",
            where=where,
            remedy="write it again with this release of secateur",
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"not JSON: {error}", where=where, remedy="write it again, or remove it"
        ) from None
