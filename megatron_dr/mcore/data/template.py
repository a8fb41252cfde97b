"""Megatron's --chat-template as the name of a file, and which thoughts are trained on."""

from argparse import Namespace
from typing import Any

from megatron_dr.data.chat_template import THOUGHTS, template_text
from megatron_dr.mcore.seams.part import Part


class TemplatePart(Part):
    """--chat-template: for messages in files that are trained on as they are."""

    flag = "--chat-template"
    flags = {
        "--dr-thoughts": {
            "choices": THOUGHTS,
            "default": None,
            "help": "whose thoughts a chat template that knows of them (--chat-template qwen3) "
            "keeps and trains on: of the turns after the last question, of all turns, or none "
            "[name] (default: the template's own, last)",
        }
    }

    def of(self, args: Namespace) -> bool | None:
        given = (getattr(args, "chat_template", None), getattr(args, "dr_thoughts", None))
        return True if any(given) else None

    def prepare(self, own: Any, args: Namespace) -> None:
        """Put the template's text where Megatron's tokenizer looks for it."""
        name = args.chat_template
        text = template_text(name, getattr(args, "dr_thoughts", None))
        if text != name and args.tokenizer_type != "HuggingFaceTokenizer":
            raise ValueError(
                f"--chat-template {name} is for --tokenizer-type HuggingFaceTokenizer, not "
                f"{args.tokenizer_type}: change that, or drop the template."
            )
        args.chat_template = text
