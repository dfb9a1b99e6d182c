"""Graphs for ONNX: what an encoder, a recogniser or a tagger makes of pictures, as one file that runs without torch.

    B batch   S side of the pictures that go in   N patches   D width   C characters   V tags

Each takes `images` u8 (B, S, S, 3), squares as data.py packs them, and has all that follows in it:
resizing, pixel statistics, network, thresholds. export.py writes them; `about` is what a reader has
to know, and travels in the file.
"""

import json
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

import data
from common import mfdn
from common.checkpoints import load_encoder
from common.gallery import decide, load_gallery
from common.io import UserError, atomic

PIP, MOST = (
    "pip install -r requirements-onnx.txt",
    3 * 2**29,
)  # bytes of weights in a file: 2 GB would be too many


class Graph(nn.Module):
    """What all three have in common: pictures of one side in, a whole view of another side for the
    encoder.
    """

    def __init__(self, encoder, packed):
        super().__init__()
        self.encoder, self.side = encoder, encoder.side * encoder.patch_size
        self.example = torch.zeros(2, packed, packed, 3, dtype=torch.uint8)

    def view(self, images):
        return data.view_images(images, *data.full_boxes(images.shape[0]), self.side)


class EncoderGraph(Graph):
    """images -> tokens (B, 1+N, D), the CLS token first."""

    outputs = ("tokens",)

    def forward(self, images):
        return (self.encoder.features(self.view(images)),)


class RecogniserGraph(Graph):
    """images -> who (B,), similarity, threshold, confidence (B,) and embedding (B, D), as
    recognize.py finds them.

    who counts the names in `about`; the character is unknown where its similarity is under its
    threshold. confidence is nan of an enrolled character.
    """

    outputs = ("who", "similarity", "threshold", "confidence", "embedding")

    def __init__(self, net, header, gallery):
        super().__init__(net.encoder, header["packed_size"])
        self.net, self.gallery = net, gallery

    def forward(self, images):
        view = self.view(images)
        both = [self.net.pooled(*self.encoder.all_patches(x)) for x in (view, view.flip(2))]
        embedding = self.net.neck(torch.stack(both).mean(0))
        who, similarity, margin, sure = decide(self.net.head(embedding), embedding, self.gallery)
        return who, similarity, similarity - margin, sure, embedding


class TaggerGraph(Graph):
    """images -> probabilities of characters (B, C), where the arm names them, and of tags (B, V)."""

    def __init__(self, net, header):
        super().__init__(net.encoder, header["packed_size"])
        self.net = net
        self.outputs = ("tags",) if net.arm == "bce" else ("characters", "tags")

    def forward(self, images):
        characters, tags = mfdn.answers(self.net, self.view(images))
        return (tags,) if characters is None else (characters.softmax(1), tags)


def graph_of(source, load_classifier, image_size=None):
    """A run or a checkpoint -> (Graph, about): a recogniser, a tagger, or an encoder, by what is in
    the folder.
    """
    if (Path(source) / "head.safetensors").exists():
        net, header = load_classifier(source)
        gallery = load_gallery(source)
        graph = RecogniserGraph(net, header, gallery)
        about = {"is": "recogniser", "names": gallery["names"], "learned": gallery["learned"]}
    elif mfdn.is_tagger(source):
        net, header = mfdn.load(source)
        if net.arm not in mfdn.NAMES_TAGS:
            raise UserError(
                f"{source} is a run of --arm {net.arm}, which names no tags; give one of --arm mfdn"
            )
        graph = TaggerGraph(net, header)
        about = {"is": "tagger", "names": header["classes"]}
        about |= {"tags": header["words"], "thresholds": header["thresholds"]}
    else:
        encoder, size = load_encoder(source, image_size)
        return EncoderGraph(encoder, size).eval(), {"is": "encoder", "side": size}
    if image_size:
        raise UserError(
            f"--image-size {image_size}: {source} is a {about['is']} and keeps the size that it learned at"
        )
    return graph.eval(), about | {
        "side": header["packed_size"],
        "crop": header["crop"],
    }


def save_onnx(graph, about, out):
    """Write what graph_of gave to out, if onnxruntime says what torch says -> a line of Python that
    loads it.
    """
    onnxruntime = library()
    if (size := sum(w.numel() * w.element_size() for w in graph.parameters())) > MOST:
        raise UserError(
            f"{size / 2**30:.1f} GB of weights are more than the {MOST / 2**30:.1f} GB of an ONNX file"
        )
    seed = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, *graph.example.shape[1:]), dtype=torch.uint8, generator=seed)
    with torch.no_grad():
        expected = graph(
            images
        )  # before it is traced: constants that kernels keep are made outside of that
    program = traced(graph)
    program.model.metadata_props["animask"] = json.dumps(about, ensure_ascii=False)
    with atomic(out) as temporary:
        program.save(str(temporary), external_data=False)
        found = onnxruntime.InferenceSession(str(temporary)).run(None, {"images": images.numpy()})
        pairs = zip(map(torch.from_numpy, found), expected, strict=True)
        if not all(torch.allclose(x, y, atol=1e-4, equal_nan=True) for x, y in pairs):
            raise UserError(
                f"onnxruntime's answers are not torch's: nothing was written; try newer ones: {PIP}"
            )
    return f"onnxruntime.InferenceSession({str(out)!r})"


def library():
    """onnxruntime, where all three that are needed are there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise UserError(f"--to onnx needs {missing.name}: {PIP}") from None
    return onnxruntime


def traced(graph):
    """The ONNX program of a graph, for any number of pictures; what the exporter says on the way is
    left out.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            graph,
            (graph.example,),
            dynamo=True,
            input_names=["images"],
            verbose=False,
            output_names=list(graph.outputs),
            dynamic_shapes={"images": {0: torch.export.Dim("B")}},
        )
