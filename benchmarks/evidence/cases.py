"""What is trained on: targets, a pool, and held-out sets apart, drawn anew from a seed."""

import dataclasses
import hashlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import alpha  # noqa: E402  (found from here on)
import snippets  # noqa: E402

VALID, TEST = 64, 192  # held-out records of a role
# base models: 3 is 1's text and order with WIDE, 3.2M parameters beside 0.5M
BASES = {1: 1, 2: 2, 3: 1}  # seeds
WIDE = "--num-layers 4 --hidden-size 256 --ffn-hidden-size 768 --num-attention-heads 8"
HIDDEN = 600  # snippets of other code in a pool, as many as there are Spanish lines
ROLES = ("target", "general")


@dataclass(frozen=True)
class Variant:
    """What a case's runs have otherwise than all others.

    Attributes:
        flags: added to those of every run.
        sharded: whether Megatron's distributed optimizer is used.
        longer: steps, of a run's usual number.
        wide: whether the model is `WIDE`.
    """

    flags: str = ""
    sharded: bool = True
    longer: int = 1
    wide: bool = False


@dataclass(frozen=True)
class Case:
    """A target, and what the general data are beside it.

    Attributes:
        size: target records.
        hidden: whether a tenth of the pool is like the target, unlabelled.
        code: whether the target is Python about concurrency; else it is Spanish.
        noise: share of the target records that are of a wrong language.
        title: of its picture.
        variant: of its runs.
        data: the case whose data it has, by name; empty: its own.
    """

    name: str
    size: int
    hidden: bool
    title: str
    code: bool = False
    noise: float = 0.0
    variant: Variant = Variant()
    data: str = ""

    @property
    def is_hard(self) -> bool:
        """Few targets, more of their kind hidden in the pool: where a projection should help."""
        return self.hidden and self.size <= 16 and not self.noise

    @property
    def base(self) -> int:
        """Of `BASES`; its text holds neither Spanish nor code."""
        return 3 if self.variant.wide else 2 if self.code else 1


def _spanish(size: int, noise: float = 0.0) -> Case:
    wrong = f", {noise:.0%} of them wrong" if noise else ""
    name = f"es{size}" + (f"-noise{100 * noise:.0f}" if noise else "")
    return Case(name, size, True, f"{size} Spanish targets{wrong}, more hidden in the pool",
                noise=noise)  # fmt: skip


_ALONE = (
    Case("es32-none", 32, False, "32 Spanish targets, none in the pool (Italian is)"),
    Case("code16-none", 16, False, "16 targets of code, none in the pool", code=True),
)
# what the trial of the rule could not look at: `elsewhere`
VARIANTS = {
    "layers": ("a projection for each layer", Variant("--dr-blocks layer")),
    "lora": ("LoRA", Variant("--dr-lora-rank 8 --lr 2e-2")),
    "sgd": ("SGD", Variant("--optimizer sgd --sgd-momentum 0.9 --lr 0.1", sharded=False)),
    "muon": ("Muon", Variant("--optimizer muon --lr 2e-3", sharded=False)),
    "wide": ("a model of 3.2M parameters", Variant(wide=True)),
    "long": ("500 steps", Variant(longer=10)),
}


def _varied(case: Case, name: str) -> Case:
    said, variant = VARIANTS[name]
    return dataclasses.replace(case, name=f"{case.name}-{name}", title=f"{case.title}; {said}",
                               variant=variant, data=case.name)  # fmt: skip


TABLES = {
    "pairs": (_spanish(8), _spanish(64), _ALONE[0],
              Case("code16", 16, True, "16 targets of code, other code hidden", code=True),
              _ALONE[1]),
    "sizes": tuple(_spanish(size) for size in (8, 32, 128, 512)),
    "noise": tuple(_spanish(64, noise) for noise in (0.0, 0.25, 0.5)),
    "nothing": _ALONE,
    "elsewhere": tuple(
        _varied(case, name) for name in VARIANTS for case in (_spanish(8), _ALONE[0])
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """The files of a case and seed.

    Attributes:
        target, pool: to train on.
        held_out: (role, part) -> file.
        digest: of all their content.
    """

    target: Path
    pool: Path
    held_out: dict[tuple[str, str], Path]
    digest: str


def lines(case: Case, seed: int) -> tuple[list[str], list[str]]:
    """(target records, pool), as lines of JSON."""
    target, pool = alpha.draw(case.size, case.hidden and not case.code, seed)
    if case.code:
        target = random.Random(seed).sample(_code()[VALID + TEST :], case.size)
        pool += _records(snippets.drawn()[1][:HIDDEN]) if case.hidden else []
    wrong = round(case.noise * case.size)
    if wrong:
        # not Italian, which is near to Spanish; what is taken leaves the pool
        others = [line for line in pool if json.loads(line)["language"] not in ("es", "it")]
        taken = random.Random(f"noise {seed}").sample(others, wrong)
        target = [*taken, *target[wrong:]]
        dropped = set(taken)
        pool = [line for line in pool if line not in dropped]
    return target, pool


def held_out(case: Case) -> dict[tuple[str, str], list[str]]:
    """(role, part) -> lines of JSON; the same for all seeds."""
    own = _code() if case.code else _read("target_heldout.jsonl")
    found = {}
    for role, known in zip(ROLES, (own, _read("general_heldout.jsonl")), strict=True):
        found[role, "valid"], found[role, "test"] = known[:VALID], known[VALID : VALID + TEST]
    return found


def _read(name: str) -> list[str]:
    path = alpha.demo.DATA / name
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def _code() -> list[str]:
    """Held-out snippets first, then those that targets are drawn from."""
    return _records(snippets.drawn()[0])


def _records(texts: list[str]) -> list[str]:
    return [json.dumps({"text": text, "language": "code"}) + "\n" for text in texts]


def write(case: Case, seed: int, out: Path) -> Data:
    """The files of a case and seed."""
    folder = out / "data" / (case.data or case.name) / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    target, pool = lines(case, seed)
    found = {("target", "train"): target, ("pool", "train"): pool, **held_out(case)}
    paths = {key: folder / f"{'-'.join(key)}.jsonl" for key in found}
    hashed = hashlib.sha256()
    for key, chosen in found.items():
        text = "".join(chosen)
        if not paths[key].exists() or paths[key].read_text(encoding="utf-8") != text:
            paths[key].write_text(text, encoding="utf-8")
        hashed.update(text.encode() + b"\0")
    held = {key: path for key, path in paths.items() if key[1] != "train"}
    return Data(paths["target", "train"], paths["pool", "train"], held, hashed.hexdigest()[:12])
