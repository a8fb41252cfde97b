"""The authors' files, as they prepare them, to what `megatron_dr.train` reads.

Which samples are taken, by which draws of which seeds, is theirs: TRAIS-Lab/Dr.Post-Training,
commit 17e86ec (SFT/data, RLHF/data/get_prompts.py, RLVR/data), and verl's examples/data_preprocess.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
LONGER = 1.2  # times the mean length of the general samples: what target samples may have, at most


def sft(
    data: Path, out: Path, wanted: Mapping[str, Any], tokenizer: Any, seed: int
) -> dict[str, Path]:
    """Files of {"dataset", "id", "messages"}: a share of the general ones, and few of the others.

    General samples whose question alone fills the sequence are left out.
    """
    general = read(data / wanted["general"])
    chance = torch.Generator().manual_seed(seed + 1)
    count = int(len(general) * wanted["share"])
    chosen = torch.randperm(len(general), generator=chance)[:count].tolist()
    length, longest = lengths(tokenizer), wanted.get("longest", 512)
    kept, total = [], 0
    for record in (general[number] for number in chosen):
        whole, asked = length(record["messages"]), length(record["messages"][:-1])
        total += min(whole, longest)
        kept += [record] if asked < longest else []
    target = read(data / wanted["target"])
    random.Random(seed).shuffle(target)
    few = target[: 3 * wanted["targets"]]
    short = [r for r in few if length(r["messages"]) <= int(LONGER * total / len(chosen))]
    files = {
        "general": kept, "target": short[: wanted["targets"]],
        "held_out": read(data / wanted["held_out"])[: wanted["held_outs"]],
    }  # fmt: skip
    return {name: write(out / f"{name}.jsonl", ({"messages": r["messages"]} for r in records))
            for name, records in files.items()}  # fmt: skip


def rlhf(
    data: Path, out: Path, wanted: Mapping[str, Any], tokenizer: Any, seed: int
) -> dict[str, Path]:
    """RealToxicityPrompts: the first tokens, 10 to 15, of each prompt with its continuation.

    Of prompts whose toxicity is above a threshold the first share is trained on, of the others
    `held_outs` are held out.
    """
    chance = random.Random(seed)
    prompts = []
    for record in read(data / wanted["prompts"]):
        if (record["prompt"]["toxicity"] or 0.0) <= wanted["above"]:
            continue
        text = record["prompt"]["text"] + record["continuation"]["text"]
        ids = tokenizer(text)["input_ids"][: chance.randint(*wanted["lengths"])]
        prompts.append({"prompt": tokenizer.decode(ids, skip_special_tokens=True)})
    first = int(len(prompts) * wanted["share"])
    rest = prompts[first : first + wanted["held_outs"]]
    return {"general": write(out / "general.jsonl", prompts[:first]),
            "held_out": write(out / "held_out.jsonl", rest)}  # fmt: skip


def rlvr(
    data: Path, out: Path, wanted: Mapping[str, Any], tokenizer: Any, _seed: int
) -> dict[str, Path]:
    """verl's Parquet files of {"prompt": messages, "reward_model": {"ground_truth"}, ...}.

    Prompts longer than `longest` tokens are left out. The target's prompts are the general ones.
    """
    import pyarrow.parquet

    length, found = lengths(tokenizer), {}
    for name in ("general", "held_out"):
        path = data / wanted[name]
        if not path.is_file():
            raise ValueError(f"{path}: no such file; examples/paper/README.md says what it holds.")
        rows = pyarrow.parquet.read_table(path).to_pylist()
        lines = [{"prompt": row["prompt"], "answer": row["reward_model"]["ground_truth"]}
                 for row in rows if length(row["prompt"]) <= wanted["longest"]]  # fmt: skip
        found[name] = write(out / f"{name}.jsonl", lines)
    return found | {"target": found["general"]}


PREPARE: Mapping[str, Callable[..., dict[str, Path]]] = {"sft": sft, "rlhf": rlhf, "rlvr": rlvr}


def lengths(tokenizer: Any) -> Callable[[Any], int]:
    """Tokens of messages by the chat template; after a question also the answer's beginning."""

    def length(messages: Any) -> int:
        asked = messages[-1]["role"] != "assistant"
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return length


def read(path: Path) -> list[Record]:
    """A file of JSON lines.

    Raises:
        ValueError: no such file, or no such lines.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; examples/paper/README.md says what it holds.")
    return list(_lines(path))


def _lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}).") from None


def write(path: Path, records: Iterable[Record]) -> Path:
    """A file of JSON lines; of none a ValueError, since no run could use it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if not text:
        raise ValueError(f"{path}: nothing of the data is left for it.")
    path.write_text(text, encoding="utf-8")
    return path
