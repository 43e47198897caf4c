"""``lightning-lora lint``: what others would refuse of a PEFT folder."""

import sys
from pathlib import Path

from lightning_lora.commands.arguments import Commands, existing_folder


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "lint",
        help="tell what vLLM, llama.cpp, transformers or PEFT would refuse of a PEFT folder",
        description="Tells what a consumer would refuse of a PEFT folder, or compute otherwise without a word, and "
        "what to do about it. Exits with 1 if there is something.",
        epilog="example: lightning-lora lint adapters/prose --target vllm",
    )
    parser.add_argument("folder", metavar="FOLDER", type=existing_folder, help="a PEFT folder")
    parser.add_argument("--target", default="vllm", help="vllm, llama.cpp, transformers or peft (default: vllm)")
    parser.add_argument("--max-lora-rank", type=int, default=16, help="what vLLM is started with (default: 16)")
    parser.set_defaults(run=run)


def run(folder: Path, target: str, max_lora_rank: int) -> None:
    """Runs it."""
    from lightning_lora.files.lint import lint

    findings = lint(folder, target, max_lora_rank=max_lora_rank)
    for finding in findings:
        print(finding)
    if findings:
        sys.exit(1)
    print(f"{target}: nothing to say about {folder}")
