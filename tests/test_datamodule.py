"""Batches: what they carry, that workers and epochs differ, and that a seed gives the same again."""

from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from facecls.data.datamodule import FacesDataModule
from facecls.data.dataset import FaceDataset
from facecls.data.file_names import parse_name
from facecls.data.parsing import MISSING
from facecls.data.sampler import FaceBatchSampler
from facecls.data.split import SPLITS
from facecls.data.transforms import EvalTransform, TrainTransform
from facecls.errors import UserError
from facecls.training.checkpoint_options import check_split


def _module(faces: Path, workers: int = 0, **options: object) -> FacesDataModule:
    data = FacesDataModule(str(faces), image_size=64, batch_size=8, num_workers=workers, **options)
    data.setup()
    return data


def _epoch(data: FacesDataModule, epoch: int = 0, start: int = 0) -> list[dict[str, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    loader.sampler.start = start
    return list(loader)


def test_a_batch_carries_images_and_the_labels_of_their_names(faces: Path) -> None:
    data = _module(faces)
    seen = []
    for batch in (*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()):
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].shape[1:] == (3, 64, 64)
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        for row, index in enumerate(batch["index"].tolist()):
            labels = parse_name(Path(data.faces.loc[index, "path"]).name)
            told = {task: data.tasks[task].text(batch[task][row].item()) for task in ("age", "gender", "race")}
            assert told == labels
            seen.append(index)
    assert len(seen) == len(set(seen))
    assert len(seen) >= 80 - 7  # the last training batch is left out when it is not full
    assert "80 faces" in data.describe()
    assert "5 rejects" in data.describe()


def test_images_are_rgb_of_the_file(faces: Path) -> None:
    data = _module(faces)
    batch = next(iter(data.test_dataloader()))
    path = faces / data.faces.loc[batch["index"][0].item(), "path"]
    bgr = cv2.resize(cv2.imread(str(path)), (64, 64), interpolation=cv2.INTER_AREA)
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), bgr[:, :, ::-1])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_seed_gives_the_same_batches_with_any_number_of_real_workers(faces: Path, workers: int) -> None:
    wanted = _epoch(_module(faces, 0, seed=3), 4)
    for batch, other in zip(wanted, _epoch(_module(faces, workers, seed=3), 4), strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in batch)


def test_workers_and_epochs_draw_different_augmentations(faces: Path) -> None:
    data = _module(faces, 2, train_transform=TrainTransform(64, dropout=1.0))
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append({i: image for b in loader for i, image in zip(b["index"].tolist(), b["image"], strict=True)})
    both = epochs[0].keys() & epochs[1].keys()
    assert len(both) > 40
    assert not any(torch.equal(epochs[0][face], epochs[1][face]) for face in both)


class _Noise(A.Compose):
    """Replaces a face by noise: two equal results can only come from equal generators."""

    def __init__(self) -> None:
        super().__init__([A.Resize(64, 64), A.CoarseDropout((1, 1), (64, 64), (64, 64), fill="random", p=1)])


def test_no_two_faces_of_a_run_share_their_random_numbers(faces: Path) -> None:
    data = _module(faces, 2, train_transform=_Noise())
    images = [image for epoch in range(3) for batch in _epoch(data, epoch) for image in batch["image"]]
    different = {image.numpy().tobytes() for image in images}
    assert len(different) == len(images) == 3 * 64


def test_orders_and_augmentations_differ_by_seed() -> None:
    rows = np.arange(64)
    one, other = (list(FaceBatchSampler(rows, 8, seed=seed)) for seed in (1, 2))
    assert not any(np.array_equal(a.faces, b.faces) for a, b in zip(one, other, strict=True))
    assert not {batch.seed for batch in one} & {batch.seed for batch in other}


def test_a_resumed_epoch_goes_on_where_it_stopped(faces: Path) -> None:
    whole, rest = _epoch(_module(faces), 2), _epoch(_module(faces, 2), 2, start=24)
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(whole[3:], rest, strict=True))


def test_batches_cover_every_face_once_and_evaluation_keeps_the_last_ones() -> None:
    rows = np.arange(10, 33)
    batches = list(FaceBatchSampler(rows, 5))
    assert np.concatenate([batch.faces for batch in batches]).tolist() == rows.tolist()
    assert len(batches) == len(FaceBatchSampler(rows, 5)) == 5
    trained = np.concatenate([batch.faces for batch in FaceBatchSampler(rows, 5, seed=0)])
    assert len(trained) == len(set(trained)) == 20
    assert [len(batch.faces) for batch in FaceBatchSampler(rows, 64, seed=0)] == [23]


def test_a_manifest_may_lack_labels(faces: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in faces.iterdir() if path.name.count("_") == 3)[:40]
    rows = pd.DataFrame({"path": [str(faces / name) for name in names], "gender": [0, None] * 20, "note": "x"})
    rows.to_csv(tmp_path / "m.csv", index=False)
    data = _module(tmp_path / "m.csv", split="all")
    batches = list(data.test_dataloader())
    gender, age = (torch.cat([batch[task] for batch in batches]) for task in ("gender", "age"))
    known = int((gender == 0).sum())
    assert known == int(data.faces["gender"].notna().sum()) > 10
    assert set(gender.tolist()) == {0, MISSING}
    assert set(age.tolist()) == {MISSING}


def test_the_notebooks_split_file_serves_validation_and_test(faces: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in faces.iterdir() if path.name.count("_") == 3)
    listed = [parse for parse in names if _is_face(parse)][:60]
    table = pd.DataFrame({"img_name": listed, "is_train": [1] * 48 + [0] * 12})
    table.to_csv(tmp_path / "split.csv", index=False)
    data = _module(faces, split_file=str(tmp_path / "split.csv"))
    val, test = (torch.cat([b["index"] for b in loader]) for loader in (data.val_dataloader(), data.test_dataloader()))
    assert torch.equal(val, test)
    assert {Path(path).name for path in data.faces.loc[val.tolist(), "path"]} == set(listed[48:])
    assert (data.rejects["reason"] == "not in the split file").sum() == 20


def _listed(faces: Path, folder: Path, train: int, test: int) -> dict[str, str]:
    """Tables as the CORAL paper's, of so many faces."""
    names = [path.name for path in sorted(faces.iterdir()) if _is_face(path.name)]
    files = {"train": names[:train], "test": names[train : train + test]}
    for part, some in files.items():
        pd.DataFrame({"file": some, "age": 0}).to_csv(folder / f"{part}.csv")
    return {part: str(folder / f"{part}.csv") for part in files}


def test_the_seed_takes_validation_faces_out_of_a_given_training_part(faces: Path, tmp_path: Path) -> None:
    """As the protocol of the CORAL paper is run: its test part as it is, all other faces left out."""
    files = _listed(faces, tmp_path, train=50, test=20)
    table = {seed: _module(faces, split_file=files, val_fraction=0.2, seed=seed) for seed in (0, 1)}
    names = {
        seed: {part: {Path(data.faces.loc[row, "path"]).name for row in data.rows(part)} for part in SPLITS}
        for seed, data in table.items()
    }
    listed = {part: set(pd.read_csv(file)["file"]) for part, file in files.items()}
    for parts in names.values():
        assert parts["test"] == listed["test"]
        assert parts["train"] | parts["val"] == listed["train"]
        assert len(parts["val"]) == 10
    assert names[0]["val"] != names[1]["val"]
    with pytest.raises(UserError, match=r"Expected data\.split_seed 0 as in training"):
        check_split(table[1], dict(table[0].hparams))
    assert (table[0].rejects["reason"] == "not in the split file").sum() == 10
    given = _module(faces, split_file={**files, "val": files["test"]} | {"test": _one(tmp_path, files["train"])})
    assert given.faces["split"].value_counts().to_dict() == {"train": 49, "val": 20, "test": 1}


def test_faces_that_are_gone_do_not_move_others_of_a_run_into_validation(faces: Path, tmp_path: Path) -> None:
    files = _listed(faces, tmp_path, train=50, test=20)
    run = _module(faces, split_file=files, val_fraction=0.2).faces
    first = pd.read_csv(files["train"]).iloc[7:]
    first.to_csv(files["train"], index=False)
    data = _module(faces, split_file=files, val_fraction=0.2)
    data.keep_split(run)
    kept = data.faces.dropna(subset="split").merge(run, on="path")
    assert len(kept) == 63
    assert (kept["split_x"] == kept["split_y"]).all()


def _one(folder: Path, listed: str) -> str:
    """Moves the first image of a table to one of its own."""
    table = pd.read_csv(listed)
    table.iloc[1:].to_csv(listed, index=False)
    table.iloc[:1].to_csv(folder / "one.csv", index=False)
    return str(folder / "one.csv")


def _is_face(name: str) -> bool:
    try:
        parse_name(name)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("part", ["train", "val", "test", "all"])
def test_any_part_can_be_tested(faces: Path, part: str) -> None:
    data = _module(faces, split=part)
    wanted = set(data.faces.index if part == "all" else data.faces.index[data.faces["split"] == part])
    assert {i for batch in data.test_dataloader() for i in batch["index"].tolist()} == wanted


def test_mistakes_are_said(faces: Path) -> None:
    with pytest.raises(UserError, match=r"Expected data\.image_size of at least 64"):
        FacesDataModule(str(faces), image_size=32)
    with pytest.raises(UserError, match="Expected faces in the val part"):
        _module(faces, val_fraction=0.0).val_dataloader()


def test_pipelines_give_the_size_and_keep_uint8() -> None:
    image = np.random.default_rng(0).integers(0, 256, (200, 180, 3), dtype=np.uint8)
    for transform in (TrainTransform(96), TrainTransform(96, crop=1.0, colour=0.0), EvalTransform(96)):
        found = transform(image=image)["image"]
        assert found.shape == (96, 96, 3)
        assert found.dtype == np.uint8


def test_runs_of_other_seeds_can_share_a_split(faces: Path) -> None:
    one, other = _module(faces, seed=1, split_seed=5), _module(faces, seed=2, split_seed=5)
    assert one.faces["split"].tolist() == other.faces["split"].tolist()
    assert one.faces["split"].tolist() == _module(faces, seed=5).faces["split"].tolist()
    assert one.faces["split"].tolist() != _module(faces, seed=1).faces["split"].tolist()
    check_split(one, dict(other.hparams))
    check_split(_module(faces, seed=5), dict(one.hparams))
    orders = [
        [index for batch in data.train_dataloader() for index in batch["index"].tolist()] for data in (one, other)
    ]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_evaluation_does_not_seed_what_it_is_given(faces: Path) -> None:
    dataset = FaceDataset(_module(faces)._store, {}, _Noise(), 64)
    batch = next(iter(FaceBatchSampler(np.arange(4), 4)))
    assert batch.seed is None
    assert not torch.equal(dataset[batch]["image"], dataset[batch]["image"])


def test_a_pipeline_of_another_size_is_refused(faces: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train_transform .* \(64, 64, 3\), but one gave uint8 of \(96, 96, 3\)"):
        _module(faces, train_transform=TrainTransform(96))


def test_batches_carry_further_labels_and_ranges_of_ages(faces: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in faces.iterdir() if _is_face(path.name))[:24]
    rows = pd.DataFrame({"path": [str(faces / name) for name in names]})
    rows["age"] = ["20-29", "31", "more than 70"] * 8
    rows["glasses"] = ["With", "without", ""] * 8
    rows.to_csv(tmp_path / "m.csv", index=False)
    data = _module(tmp_path / "m.csv", split="all", tasks={"glasses": {"classes": ["without", "with"]}})
    seen = {}
    for batch in data.test_dataloader():
        for row, index in enumerate(batch["index"].tolist()):
            columns = ("age", "age_from", "age_to", "glasses")
            seen[Path(data.faces.loc[index, "path"]).name] = tuple(batch[column][row].item() for column in columns)
    wanted = [(MISSING, 20, 29, 1), (31, MISSING, MISSING, 0), (MISSING, 70, 116, MISSING)] * 8
    assert seen == dict(zip(names, wanted, strict=True))
