"""Layer maps: which draft layer's attention chooses the KV entries of each target layer.

A map is a JSON file (schema below) made for one pair of models and refused for any other. See `docs/layer-maps.md`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from specattn_vllm.fingerprint import ModelFacts

SCHEMA = "specattn-layer-map/1"
UNIFORM = "uniform"


class LayerMapError(ValueError):
    """A layer map that is missing, malformed or made for other models; the message has the remedy."""


class LayerMap(BaseModel):
    """One calibrated (or uniform) pairing of target layers with draft layers."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["specattn-layer-map/1"]
    method: Literal["specattn", "sts"]
    calibrated: bool
    target: ModelFacts
    draft: ModelFacts
    layers: tuple[int | None, ...]
    """Draft layer for each target layer; None reads everything."""
    heads: tuple[tuple[int, ...], ...] | None = None
    """For per-head methods: draft KV head for each target layer and target KV head."""
    provenance: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _schema_key(cls, data: Any) -> Any:
        # `schema` would hide a method of BaseModel, so the field carries an underscore and the file does not.
        if isinstance(data, dict) and "schema" in data:
            data = {**data, "schema_": data["schema"]}
            del data["schema"]
        return data

    @model_validator(mode="after")
    def _shapes_agree(self) -> LayerMap:
        if len(self.layers) != self.target.num_hidden_layers:
            raise ValueError(f"layers has {len(self.layers)} entries for {self.target.num_hidden_layers} target layers")
        for j, i in enumerate(self.layers):
            if i is not None and not 0 <= i < self.draft.num_hidden_layers:
                raise ValueError(f"layers[{j}] = {i}, but the draft has layers 0 to {self.draft.num_hidden_layers - 1}")
        return self

    def with_dense(self, dense_layers: tuple[int, ...]) -> LayerMap:
        """The same map with more target layers reading everything."""
        for j in dense_layers:
            if j >= len(self.layers):
                raise LayerMapError(
                    f"dense_layers contains {j}, but the target has layers 0 to {len(self.layers) - 1}: remove it"
                )
        layers = tuple(None if j in dense_layers else i for j, i in enumerate(self.layers))
        return self.model_copy(update={"layers": layers})

    @property
    def sources(self) -> tuple[int, ...]:
        """The draft layers whose attention is captured, ascending."""
        return tuple(sorted({i for i in self.layers if i is not None}))


def uniform(target: ModelFacts, draft: ModelFacts) -> LayerMap:
    """Pair layers by relative depth, the first target layer dense: a start, not a calibration."""
    m, n = target.num_hidden_layers, draft.num_hidden_layers
    layers = tuple(None if j == 0 else min(n - 1, (j * n) // m) for j in range(m))
    return LayerMap(schema_=SCHEMA, method="specattn", calibrated=False, target=target, draft=draft, layers=layers)


def shipped() -> dict[str, Path]:
    """Maps that come with the package, by name."""
    folder = Path(str(resources.files("specattn_vllm.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def read(path: Path) -> LayerMap:
    """Parse one file; raises LayerMapError naming the file and each problem."""
    try:
        return LayerMap.model_validate_json(path.read_bytes())
    except OSError as error:
        raise LayerMapError(
            f"layer_map = {str(path)!r} cannot be read ({error.strerror}). Give the path of a JSON file, 'uniform', "
            f"or a shipped map: {', '.join(shipped()) or 'none'}"
        ) from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise LayerMapError(f"layer map {path} is not valid ({SCHEMA}): {problems}") from None


def resolve(name: str | None, target: ModelFacts, draft: ModelFacts, *, check_weights: bool = True) -> LayerMap:
    """The map an engine uses: a named one must fit the models, the default falls back to `uniform`.

    Raises LayerMapError if a map that was asked for was made for other models.
    """
    if name == UNIFORM:
        return uniform(target, draft)
    if name is None:
        for path in shipped().values():
            candidate = read(path)
            # By default only a map for these very weights is taken; anything else has to be asked for.
            if candidate.target == target and candidate.draft == draft:
                return candidate
        return uniform(target, draft)
    found = read(shipped().get(name, Path(name)))
    if found.method != "specattn" or found.heads is not None:
        raise LayerMapError(
            f"layer_map = {name!r} is for method {found.method!r}{' with a head map' if found.heads else ''}; this "
            "version has maps for 'specattn' without heads only: use another map, or layer_map='uniform'"
        )
    problems = [
        f"{side} {difference}"
        for side, ours, theirs in (("target", found.target, target), ("draft", found.draft, draft))
        for difference in ours.differences(theirs, weights=check_weights)
    ]
    if problems:
        raise LayerMapError(
            f"layer_map = {name!r} was made for other models (map != served): {'; '.join(problems)}. Use a map "
            "made for this pair, layer_map='uniform', or, if only the weights differ, check_weights=false"
        )
    return found
