"""Layer maps. A map names, for each target layer, the draft layer (and its KV heads) whose attention chooses the KV
entries that the target layer reads.

A map is a JSON file (`LayerMap`), made for one pair of models and refused for any other. See `docs/layer-maps.md`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, model_validator

from specattn_vllm import data_file, methods
from specattn_vllm.fingerprint import ModelFacts

SCHEMA = "specattn-layer-map/1"
UNIFORM = "uniform"
LARGEST = 8 * 2**20
"""Bytes of a map's file. A map with heads of 200 layers of 128 KV heads has a tenth of them."""
MOST = 10
"""Problems of a file that its error tells."""
GONE = ("shares", "induction")
"""Keys of older maps. Their features no longer exist, and ignoring the keys would silently change what is served."""


class LayerMapError(ValueError):
    """A layer map is missing, malformed or made for other models. The message has the remedy."""


class LayerMap(BaseModel):
    """One calibrated or uniform mapping of target layers to draft layers."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["specattn-layer-map/1"] = Field(alias="schema")
    """Its key in the file is `schema`. That name would hide a method of BaseModel here."""
    method: Literal["specattn", "sts"]
    calibrated: StrictBool
    target: ModelFacts
    draft: ModelFacts
    layers: tuple[StrictInt | None, ...]
    """Draft layer for each target layer; None: the target layer is dense."""
    heads: tuple[tuple[StrictInt, ...] | None, ...] | None = None
    """Draft KV head for each target layer and KV head; None for dense layers. Only for method 'sts'."""
    provenance: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _of_this_version(cls, data: Any) -> Any:
        if isinstance(data, dict) and (gone := [name for name in GONE if name in data]):
            raise ValueError(
                f"keys of an older version: {', '.join(gone)}. Delete them from the file, or make the map anew "
                "(specattn calibrate)"
            )
        return data

    @model_validator(mode="after")
    def _shapes_agree(self) -> LayerMap:
        if len(self.layers) != self.target.num_hidden_layers:
            raise ValueError(f"layers has {len(self.layers)} entries for {self.target.num_hidden_layers} target layers")
        for j, i in enumerate(self.layers):
            if i is not None and not 0 <= i < self.draft.num_hidden_layers:
                raise ValueError(f"layers[{j}] = {i}, but the draft has layers 0 to {self.draft.num_hidden_layers - 1}")
        given = ("layers",) if self.heads is None else ("layers", "heads")
        if given != (wanted := methods.find(self.method).map_keys):
            raise ValueError(f"a map for method {self.method!r} has {' and '.join(wanted)}, not {' and '.join(given)}")
        if self.heads is not None:
            self._head_shapes_agree(self.heads)
        return self

    def _head_shapes_agree(self, heads: tuple[tuple[int, ...] | None, ...]) -> None:
        ours, theirs = self.target.num_key_value_heads, self.draft.num_key_value_heads
        if len(heads) != len(self.layers):
            raise ValueError(f"heads has {len(heads)} entries for {len(self.layers)} target layers")
        for j, row in enumerate(heads):
            if (row is None) != (self.layers[j] is None):
                raise ValueError(f"heads[{j}] = {row}, but layers[{j}] = {self.layers[j]}: null goes with null")
            if row is not None and len(row) != ours:
                raise ValueError(f"heads[{j}] has {len(row)} entries for {ours} target KV heads")
            for h, head in enumerate(row or ()):
                if not 0 <= head < theirs:
                    raise ValueError(f"heads[{j}][{h}] = {head}, but the draft has KV heads 0 to {theirs - 1}")

    def with_dense(self, dense_layers: tuple[int, ...]) -> LayerMap:
        """The same map with more dense target layers."""
        for j in dense_layers:
            if j >= len(self.layers):
                raise LayerMapError(
                    f"dense_layers contains {j}, but the target has layers 0 to {len(self.layers) - 1}: remove it"
                )
        layers = tuple(None if j in dense_layers else i for j, i in enumerate(self.layers))
        heads = self.heads and tuple(None if j in dense_layers else row for j, row in enumerate(self.heads))
        return self.model_copy(update={"layers": layers, "heads": heads})

    def local_heads(self, rank: int, ranks: int) -> tuple[tuple[int, ...] | None, ...]:
        """The head map of one tensor-parallel rank: for each target layer and each KV head of the rank, the draft KV
        head of the same rank that chooses. Without `heads`, heads are paired by proportion.

        Raises LayerMapError if the ranks do not hold equal shares of both models' heads, or if a head is mapped to a
        head of another rank.
        """
        ours, theirs = self.target.num_key_value_heads, self.draft.num_key_value_heads
        for side, count in (("target", ours), ("draft", theirs)):
            if count % ranks:
                raise LayerMapError(
                    f"tensor_parallel_size = {ranks} does not divide the {count} KV heads of the {side}, and "
                    "selections per head need the same number on every rank: use a size that does, or method='specattn'"
                )
        first, local = rank * (theirs // ranks), theirs // ranks
        rows: list[tuple[int, ...] | None] = []
        for j, layer in enumerate(self.layers):
            row = self.heads[j] if self.heads is not None else tuple(h * theirs // ours for h in range(ours))
            if layer is None or row is None:
                rows.append(None)
                continue
            mine = range(rank * (ours // ranks), (rank + 1) * (ours // ranks))
            for h in mine:
                if not first <= row[h] < first + local:
                    raise LayerMapError(
                        f"heads[{j}][{h}] = {row[h]} of the layer map lies on another rank than the target's head {h} "
                        f"(tensor_parallel_size = {ranks}): use a map that stays within each rank, or set "
                        "layer_map='uniform'"
                    )
            rows.append(tuple(row[h] - first for h in mine))
        return tuple(rows)

    @property
    def sources(self) -> tuple[int, ...]:
        """The draft layers whose attention is captured, ascending."""
        return tuple(sorted({i for i in self.layers if i is not None}))


def uniform(target: ModelFacts, draft: ModelFacts) -> LayerMap:
    """Pair layers by relative depth; the first target layer is dense. This is a starting point, not a calibration."""
    m, n = target.num_hidden_layers, draft.num_hidden_layers
    layers = tuple(None if j == 0 else min(n - 1, (j * n) // m) for j in range(m))
    return LayerMap(schema_=SCHEMA, method="specattn", calibrated=False, target=target, draft=draft, layers=layers)


def shipped() -> dict[str, Path]:
    """Name -> file of the maps that come with the package."""
    folder = Path(str(resources.files("specattn_vllm.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def read(path: Path) -> LayerMap:
    """Parse one file. Raises LayerMapError, which names the file and each problem."""
    try:
        data = data_file.read(path, LARGEST)
        data_file.parse(data)
        return LayerMap.model_validate_json(data)
    except OSError as error:
        raise LayerMapError(
            f"layer_map = {str(path)!r} cannot be read ({error.strerror}). Give the path of a JSON file, 'uniform', "
            f"or a shipped map: {', '.join(shipped()) or 'none'}"
        ) from None
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        problems = [
            f"{'.'.join(map(str, of['loc'])) or 'file'}: {of['msg'].removeprefix('Value error, ')}"
            for of in found[:MOST]
        ]
        raise LayerMapError(_invalid(path, problems, len(found))) from None
    except ValueError as error:
        raise LayerMapError(_invalid(path, [f"file: Invalid JSON: {error}"], 1)) from None


def _invalid(path: Path, problems: list[str], number: int) -> str:
    told = [data_file.plain(problem) for problem in problems]
    if number > len(told):
        told.append(f"and {number - len(told):,} other problems")
    return f"layer map {path} is not valid ({SCHEMA}): {'; '.join(told)}"


def shipped_file(found: LayerMap) -> Path | None:
    """The shipped file from which a map was read, even if layers were made dense since; None if it is not shipped."""
    for path in shipped().values():
        theirs = read(path)
        if (theirs.target, theirs.draft, theirs.provenance) == (found.target, found.draft, found.provenance):
            return path
    return None


def _is_taken_for(found: LayerMap, target: ModelFacts, draft: ModelFacts) -> bool:
    """Whether a shipped map is used by default for these models. A calibrated map is used only for the weights on which
    it was calibrated; a uniform map is used for all weights of the same shapes."""
    if found.calibrated:
        return (found.target, found.draft) == (target, draft)
    return not found.target.differences(target) and not found.draft.differences(draft)


def resolve(name: str | None, target: ModelFacts, draft: ModelFacts, *, method: str = "specattn") -> LayerMap:
    """The map that an engine uses for a method. A named map must fit the method and the models. Without a name, it is
    the best shipped map for them, calibrated ones first, or else `uniform`.

    Raises LayerMapError if a named map was made for another method or other models.
    """
    kind = methods.find(method)
    if name == UNIFORM:
        return uniform(target, draft)
    if name is None:
        maps = [found for path in shipped().values() if _is_taken_for(found := read(path), target, draft)]
        ranked = [(kind.map_rank(found.method), found) for found in maps]
        usable = [(not found.calibrated, rank, found) for rank, found in ranked if rank is not None]
        return min(usable, key=lambda of: of[:2])[2] if usable else uniform(target, draft)
    path = shipped().get(name, Path(name))
    if path.suffix != ".json":
        raise LayerMapError(
            f"layer_map = {data_file.plain(repr(name))} is neither 'uniform', nor a shipped map, nor a file whose name "
            f"ends with .json: give one of these (shipped: {', '.join(shipped()) or 'none'})"
        )
    found = read(path)
    if kind.map_rank(found.method) is None:
        raise LayerMapError(
            f"layer_map = {name!r} was made for method {found.method!r}, but method = {method!r} takes maps for "
            f"{' or '.join(map(repr, kind.maps))}: use another map, or layer_map='uniform'"
        )
    problems = [
        f"{side} {difference}"
        for side, ours, theirs in (("target", found.target, target), ("draft", found.draft, draft))
        for difference in ours.differences(theirs)
    ]
    if problems:
        raise LayerMapError(
            f"layer_map = {name!r} was made for other models (map != served): {'; '.join(problems)}. Use a map "
            "made for this pair, layer_map='uniform', or, if only the weights differ, a copy of it with weights null"
        )
    return found
