"""``lightning-lora export``: a PEFT folder of a checkpoint, without the model."""

from pathlib import Path

from lightning_lora.commands.arguments import Commands, existing, local_path


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "export",
        help="write an adapter of a checkpoint as a PEFT folder",
        description="Writes an adapter of a checkpoint as a PEFT folder (adapter_config.json, "
        "adapter_model.safetensors, README.md), which PEFT, transformers and vLLM load. It does not need the model. "
        "What started with a part of the weight (PiSSA, OLoRA, LoftQ) is written against the clean base.",
        epilog="example: lightning-lora export runs/demo/last.ckpt adapters/prose",
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=existing, help="a checkpoint of a run with the callback")
    parser.add_argument("out", metavar="OUT", type=local_path, help="the folder to write; other files in it stay")
    parser.add_argument("--adapter", metavar="NAME", help="which adapter, if the checkpoint has several")
    parser.set_defaults(run=run)


def run(checkpoint: Path, out: Path, adapter: str | None) -> None:
    """Runs it."""
    from lightning_lora.errors import listing
    from lightning_lora.formats.peft_from_checkpoint import export_checkpoint
    from lightning_lora.formats.peft_read import read_folder

    name = export_checkpoint(checkpoint, out, adapter)
    print(f"adapter {name!r} of {checkpoint} is in {out}")
    if beside := read_folder(out).beside:
        print(f"other adapters trained {listing(beside, 3)} in full, which this one does not bring")
