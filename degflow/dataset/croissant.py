"""croissant.json: what a dataset holds, for machines, in the format Croissant 1.0 of MLCommons.

https://docs.mlcommons.org/croissant/docs/croissant-spec.html; the package mlcroissant reads the rows by it, and search
engines for datasets find them.
"""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from degflow.dataset.layout import ROW

_TERMS = """
    citeAs column equivalentProperty extract field fileObject fileProperty fileSet format includes isLiveDataset
    jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate separator source
    subField transform
"""
_CONTEXT = {  # the specification's; readers warn if a term is missing
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "data": {"@id": "cr:data", "@type": "@json"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS.split()},
}
_CITATION = (
    "@inproceedings{degflow, title={Continuous Degradation Modeling via Latent Flow Matching for Real-World "
    "Super-Resolution}, author={Kim, Hyeonjae and Kim, Dongjin and Jin, Eugene and Kim, Tae Hyun}, booktitle={AAAI}, "
    "year={2026}}"
)
_KINDS = {pa.string(): "sc:Text", pa.float64(): "sc:Float", pa.int32(): "sc:Integer", pa.int64(): "sc:Integer"}


def croissant(rows: int, recipe: Mapping[str, Any]) -> str:
    """The file's text.

    Args:
        rows: number of LR images.
        recipe: the resolved configuration.
    """
    embedded = recipe["hr"] == "embed"
    fields = [_field(column.name, *_kind(column, embedded)) for column in ROW]
    parts = {"@type": "cr:FileSet", "@id": "parts", "name": "parts", "encodingFormat": "application/x-parquet"}
    description = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": "degflow-pairs",
        "description": f"{rows} low-resolution images, made from high-resolution photographs by degflow.",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "license": "The licences of the photographs; see README.md",
        "citeAs": _CITATION,
        "version": "1.0.0",
        "distribution": [parts | {"includes": "data/*.parquet"}],
        "recordSet": [{"@type": "cr:RecordSet", "@id": "rows", "name": "rows", "field": fields}],
    }
    return json.dumps(description, indent=1) + "\n"


def _kind(column: pa.Field, embedded: bool) -> tuple[str, str]:
    """The data type, and what is taken of a column that has parts; HR that is not embedded is a reference."""
    if not pa.types.is_struct(column.type):
        return _KINDS[column.type], ""
    return ("sc:ImageObject", "bytes") if column.name == "lr" or embedded else ("sc:Text", "path")


def _field(name: str, kind: str, part: str) -> dict[str, Any]:
    source: dict[str, Any] = {"fileSet": {"@id": "parts"}, "extract": {"column": name}}
    if part:
        source["transform"] = {"jsonPath": part}
    return {"@type": "cr:Field", "@id": f"rows/{name}", "name": f"rows/{name}", "dataType": kind, "source": source}
