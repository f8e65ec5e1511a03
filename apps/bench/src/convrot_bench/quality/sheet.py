"""The first pictures of a run side by side: a row a method, the PSNR under each picture."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from convrot_bench.quality.methods import Method
from convrot_bench.quality.metrics import psnr_db, unit
from convrot_bench.quality.pictures import BF16, Store
from convrot_bench.quality.plots import contact_sheet
from convrot_bench.quality.tables import SHORT

SHOWN = 6
MOST = 10  # methods; of more, those of README's table


def save_sheet(path: Path, store: Store, methods: Sequence[Method], steps: int) -> None:
    """Write the picture file of what the store has, methods without pictures left out."""
    some = methods if len(methods) <= MOST else [m for m in methods if m.name in SHORT]
    titles = {BF16: "BF16"} | {m.name: m.title for m in some}
    wanted = range(SHOWN)
    reference = store.load(BF16, steps, wanted)
    pictures, notes = {}, {}
    for name, title in titles.items():
        kept = store.load(name, steps, wanted)
        if not kept:
            continue
        pictures[title] = [kept[i] for i in sorted(kept)]
        notes[title] = ["" if name == BF16 else _note(kept[i], reference[i]) for i in sorted(kept)]
    if not pictures:
        return  # the run failed before it drew, and says so itself
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, notes).savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)


def _note(image: Tensor, reference: Tensor) -> str:
    return f"{float(psnr_db(unit(image)[None], unit(reference)[None])):.1f} dB"
