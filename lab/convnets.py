"""Convolutional networks in the place of our ViT, the baselines that the field would pick first.

    python -m lab.convnets resnet50 --method full --from-scratch --data datasets/mine
    python -m lab.convnets runs/resnet50-full               measures it as apps/unknown.py does
    python -m lab.convnets runs/resnet50-full PICTURE...    names pictures as apps/recognize.py does

The stages know ViTs only. `in_stages` gives them networks of transformers by functions of the same
names. "Patches" are the whole view. Tokens (B, 1+N, D) are the places of the last map, and their
mean is in the place of the CLS token.
"""

import sys

import torch
from torch import nn

import finetune_lora
from apps import recognize, unknown
from common import checkpoints, features
from common.checkpoints import about_model, model_file
from common.classifier import is_recogniser
from common.door import require
from common.train import UserError, cli, read_safetensors, save_safetensors
from finetune_lora import add_lora
from kernels import MEAN, STD

NETWORKS = {  # width of the last map
    "resnet50": 2048,  # He et al. 2015, arXiv:1512.03385
    "resnet10": 320,  # a block a stage, as many parameters as nano
    "efficientnet_b0": 1280,  # Tan and Le 2019, arXiv:1905.11946
}
SMALL = {"hidden_sizes": [40, 80, 160, 320], "depths": [1] * 4, "embedding_size": 40}
SMALL["layer_type"] = "basic"


class ConvNet(nn.Module):
    """config: network, a name of NETWORKS, and image_size."""

    blocks = ()  # no block learns at a rate of its own
    side = 1  # no patch can be left out

    def __init__(self, network, image_size):
        super().__init__()
        self.config = {"network": network, "image_size": image_size}
        self.image_size = self.patch_size = image_size
        self.body = build(network, image_size).to(memory_format=torch.channels_last)
        self.register_buffer("cls_token", torch.zeros(1, 1, NETWORKS[network]), persistent=False)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def all_patches(self, view):
        """view u8 (B, S, S, 3), nothing of it masked -> the view, which has one place."""
        return view, torch.zeros(len(view), 1, dtype=torch.long)

    def forward(self, view, _):
        """view u8 (B, S, S, 3) -> tokens (B, 1+N, D), the first the mean of the others."""
        x = (view.permute(0, 3, 1, 2) / 255 - self.mean) / self.std
        places = self.body(x.contiguous(memory_format=torch.channels_last)).last_hidden_state
        places = places.flatten(2).mT
        return torch.cat([places.mean(1, keepdim=True), places], 1)

    def features(self, view):
        return self(view, None)


def build(name, image_size):
    """The network of transformers, without a classifier, weights random."""
    require("segment", "transformers")
    from transformers import EfficientNetConfig, EfficientNetModel, ResNetConfig, ResNetModel

    if name != "efficientnet_b0":
        return ResNetModel(ResNetConfig(**SMALL if name == "resnet10" else {}))
    # transformers' momentum is TensorFlow's, and its weights of std 0.02 let no signal through
    scales = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "dropout_rate": 0.2}
    scales |= {"hidden_dim": NETWORKS[name], "batch_norm_momentum": 0.1}
    net = EfficientNetModel(EfficientNetConfig(image_size=image_size, **scales))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    return net


def load_any(path, image_size=None):
    """As checkpoints.load_encoder; a name of NETWORKS, or a run of one, is that network."""
    config = about_model(path).get("config", {})
    if "network" not in config and str(path) not in NETWORKS:
        return checkpoints.load_encoder(path, image_size)
    network = config.get("network", str(path))
    side = image_size or config.get("image_size", 64)
    torch.manual_seed(0)  # a bare name has no weights: random ones, the same in each call
    net = ConvNet(network, side)
    if model_file(path).exists():
        net.load_state_dict(read_safetensors(model_file(path))[0])
    return net.eval()


def save_any(encoder, path, about, prefix=""):
    """As checkpoints.save_network."""
    if isinstance(encoder, ConvNet):
        save_safetensors(encoder.state_dict(), path, {"config": encoder.config, **about})
    else:
        checkpoints.save_network(encoder, path, about, prefix)


def untrained_like(encoder, seed=0):
    """As features.untrained_like."""
    if not isinstance(encoder, ConvNet):
        return features.untrained_like(encoder, seed)
    torch.manual_seed(seed)
    return ConvNet(**encoder.config).eval()


def add_any(encoder, *args, **keys):
    """As finetune_lora.add_lora, which adapts the layers of a ViT alone."""
    if isinstance(encoder, ConvNet):
        raise UserError("--method lora adapts the layers of a ViT; give --method full or linear")
    add_lora(encoder, *args, **keys)


def in_stages():
    """From now on finetune_lora.py, and what loads its runs, takes these networks, too."""
    finetune_lora.load_encoder = load_any
    finetune_lora.save_network = save_any
    finetune_lora.untrained_like = untrained_like
    finetune_lora.add_lora = add_any
    finetune_lora.NEXT = "python -m lab.convnets"


def main():
    in_stages()
    stage = finetune_lora
    if len(sys.argv) > 1 and is_recogniser(sys.argv[1]):
        names = len(sys.argv) > 2 and not sys.argv[2].startswith("-")  # of pictures
        stage = recognize if names else unknown
    stage.main()


if __name__ == "__main__":
    cli(main)
