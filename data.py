"""Stage 0: packed sets of images, read in batches and cut into views.

    python data.py PATH --out datasets/NAME     PATH: a folder, zip, tar, table or list of images,
                                                or the word toon, the demo set
    python data.py --show datasets/NAME         a sheet of what was packed

Reads:  images in any layout that ingest/sources.py knows
Writes: datasets/NAME/{train,val,test}.safetensors, dev with --dev, and unknown, which has pictures
        of other characters (ingest/pack.py)

    n images of a split   B of a batch   S side of an image   s of a view   G of a map

A split is a dict of arrays that stay in their file, so memory does not grow with the data set. A
view is a crop, perhaps flipped, and resized on the device by two matrix products. Maps of an image are
cut in the same way.
"""

import hashlib
import json
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common.train import UserError, cli, open_tensors, progress, quoted

LUMA = (0.299, 0.587, 0.114)  # share of red, green and blue in brightness (ITU-R BT.601)
CHUNK = 64  # whole images at a time; on a CPU, 256 were four times slower (results/TRIED.md)

SPLITS = ("train", "val", "test", "dev")  # some sets have no train


# ---- a split -------------------------------------------------------------------------------------


def splits_in(folder):
    """The names of the splits that a packed folder has, train first."""
    return [name for name in SPLITS if (Path(folder) / f"{name}.safetensors").exists()]


def open_split(folder, name):
    """{"images": u8 (n, S, S, 3), "labels": i64 (n), "header", ...}: arrays of a file as memory maps.

    The header says at least classes, keys and size. Where they are known, there are also fg, parts and
    drawn u8 (n, S, S), tags i32 (n, T) and boxes f32 (n, K, 4). A picture without a label has -1.
    """
    path = Path(folder) / f"{name}.safetensors"
    advice = f"python data.py IMAGES --out {quoted(folder)} makes it"
    names = sorted(file.stem for file in Path(folder).glob("*.safetensors"))
    if not names:
        raise UserError(f"{path} does not exist; {advice}")
    if name not in names:
        choices = ", ".join(names)
        fix = "choose one of them, or pack it again, with a share for it: --split .7,.1,.2"
        raise UserError(f"{folder} has no split {name}, only {choices}; {fix}")
    split = open_tensors(path)
    # Pictures stay in the file, whatever their number. Labels are small, and are read at once.
    split["labels"] = torch.from_numpy(np.array(split["labels"]))
    return split


def open_or_pack(path, image_size=0, pages=False):
    """The packed folder that --data names. Without one, the demo set is drawn, or pictures are packed.

    image_size: of the views that will be cut from them; pages: they are whole pages, whose boxes are
    packed, too.
    """
    path = Path(path)
    if splits_in(path):
        note_small(path, image_size, pages)
        return path
    # Imported here, and not at the top, because who reads a packed set needs no decoder of images.
    from ingest.pack import DRAWN, PACKED, default_out, pack

    if path.name in DRAWN and not any(path.glob("*")):
        print(f"drawing {path} (once)")
        pack(path.name, path)
        return path
    out = default_out(path)
    files = list(out.glob("*.safetensors"))
    if not files:
        # Packed larger than a small network's views: a crop of 0.4 of the area then still has its
        # own pixels, and is not a picture of few pixels blown up.
        options = {"detect": True} if pages else {"size": max(PACKED, image_size)}
        pack(path, out, **options)
    elif Path(open_split(out, files[0].stem)["header"]["source"]).resolve() != path.resolve():
        advice = f"python data.py {quoted(path)} --out datasets/OTHER, then --data that"
        raise UserError(f"{out} was packed from another place; {advice}")
    else:
        advice = f"python data.py {quoted(path)} --out datasets/OTHER"
        print(f"note     {out} was packed before; for new pictures of {path}: {advice}")
        note_small(out, image_size, pages)
    return out


def note_small(folder, image_size, pages):
    """A line if pictures are packed smaller than a network's views, which enlarge them."""
    if pages or not image_size:
        return
    size = open_split(folder, splits_in(folder)[0])["header"]["size"]
    if size < image_size:
        fix = f"pack them again with --size {image_size}"
        print(f"note     {folder} has pictures of {size} px, enlarged to {image_size}: {fix}")


def fingerprint(split):
    """A hash of the header, which holds a digest of the pixels and labels ("pixels")."""
    # Where the pictures came from does not count, nor do notes about them: a moved folder is the same
    # data set, and maps made of it must still fit.
    header = {k: v for k, v in split["header"].items() if k not in ("source", "notes")}
    return hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=6).hexdigest()


def digest(folder):
    """The fingerprints of train, val, test and dev: what was learned, chosen and reported by."""
    # That of train alone would not see that a label of dev was mended, or that pictures were dealt anew.
    return "-".join(fingerprint(open_split(folder, name)) for name in splits_in(folder))


def has_labels(split):
    return len(split["header"]["classes"]) > 1 and bool((split["labels"] >= 0).all())


# ---- maps: what apps/maps.py makes of train, one row per image ----------------------------------------


def maps_command(folder, name):
    """The command that makes these maps; all but saliency read the tokens of a run."""
    run = "" if name == "saliency" else " --run RUN"
    return f"python -m apps.maps --data {quoted(folder)} --map {name}{run}"


def open_map(path, name, split):
    """The map `name` of this split's images, a memory map (n, G, G), and its header.

    path: the file or its folder. A UserError names the command that makes the map.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / f"{name}.safetensors"
    folder = Path(split["images"].filename).parent
    advice = maps_command(folder, name)
    if not path.exists():
        raise UserError(f"no {name} maps at {path}: {advice} --out {path.parent} makes them")
    advice += f" --out OTHER makes those of {folder}"
    arrays = open_tensors(path)
    # A map belongs to a picture by its number alone. Those of another set often have the right
    # shape, and each mask would follow a wrong picture without an error.
    if arrays["header"].get("data_digest") != fingerprint(split):
        raise UserError(f"{path} holds maps of another data set; {advice}")
    return arrays[name], arrays["header"]


# ---- the loader ----------------------------------------------------------------------------------


def resident(images, device):
    """images u8 (n, ...): copied to the GPU if a quarter of its free memory holds them."""
    if images is None or device.type != "cuda":
        return images
    # The rest of the memory is for the network: its activations are not there yet.
    if images.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return images
    # Piece by piece, because a memory map that is copied at once would first fill the CPU's memory.
    copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for i in range(0, len(images), 4096):
        copy[i : i + 4096] = torch.from_numpy(np.array(images[i : i + 4096]))
    return copy


def send(x, device):
    """A tensor on the device. The copy from CPU to GPU does not wait: the memory is pinned."""
    # Only from pinned memory can a GPU fetch by itself while the CPU goes on. Otherwise each copy
    # is a wait, and a step has several.
    if device.type == "cuda" and x.device.type == "cpu":
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)


def take(images, index, device):
    """Rows `index` (i64, CPU) of a memory map or a tensor, such as images u8 (n, S, S, 3) -> (B, S, S, 3)
    on the device, of the same dtype."""
    if isinstance(images, torch.Tensor):
        return send(images[send(index, images.device)], device)
    return send(torch.from_numpy(images[index.numpy()]), device)


def epoch_order(n, seed, epoch):
    """The order of the images in an epoch: the same for every strategy with this seed."""
    # A generator of its own for each epoch, and not one that runs on: a run that is resumed in
    # epoch 7 has the order of epoch 7 at once, and no other draw can shift it.
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


def batches(images, order, batch_size, device, start=0):
    """Yield (index (B,), images u8 (B, S, S, 3) or features, on the device) from batch `start` on.

    Images that fill no batch are left out.
    """
    # A last, smaller batch would be another shape to compile, and each of its images would weigh
    # more. The next epoch has another order, so that no image is left out for good.
    used = len(order) // batch_size * batch_size
    chunks = order[:used].split(batch_size)[start:]
    load_device = torch.device("cpu") if device.type == "mps" else device  # Metal is for one thread
    # Images that the GPU has no room for are copied on a stream of their own, beside the steps before them: on
    # the stream of the steps, each would wait for its copy.
    is_apart = device.type == "cuda" and not isinstance(images, torch.Tensor)
    stream = torch.cuda.Stream(device) if is_apart else None

    def load(index):
        with torch.cuda.stream(stream):  # None: where it is
            batch = take(images, index, load_device)
            return index, batch, stream and stream.record_event()

    for index, batch, arrived in prefetch(map(load, chunks)):
        if arrived:
            here = torch.cuda.current_stream(device)
            here.wait_event(arrived)  # the GPU waits, and not the CPU
            batch.record_stream(here)  # its memory is free again after the steps that read it
        yield index, send(batch, device)


def prefetch(items, depth=3):
    """Iterate over items, while a thread makes the next `depth` of them.

    The thread must not run parallel operations of torch: more OpenMP threads slow the loop by half.
    """
    items = iter(items)
    end = object()  # equal to no item
    # One thread keeps the order, and reads into the memory that the loop uses. Processes, such as
    # torch's DataLoader starts, would have to send every picture to this one.
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item


# ---- views: crop, flip and resize ----------------------------------------------------------------


def draw_boxes(n, generator, min_area):
    """Random resized crops (MAE): boxes (n, 4) and flips (n,) bool, drawn on the CPU.

    A box is top, left, height, width in [0, 1]: area uniform in [min_area, 1], aspect log-uniform
    in [3/4, 4/3]. Sides are cut at 1, so from 0.75 on some crops are smaller than min_area.
    """
    # Five numbers for each view, whatever they are. torchvision draws again where a box does not
    # fit, so that one crop would shift the random numbers of all that follow.
    u = torch.rand(5, n, generator=generator)
    area = min_area + (1 - min_area) * u[0]
    # Uniform in the logarithm: twice as wide is then as likely as twice as high.
    aspect = torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    height = (area * aspect).sqrt().clamp(max=1)
    width = (area / aspect).sqrt().clamp(max=1)
    return torch.stack([u[2] * (1 - height), u[3] * (1 - width), height, width], 1), u[4] < 0.5


def full_boxes(n):
    """Boxes and flips of whole images: what evaluations and teachers see."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(n, 4), torch.zeros(n, dtype=torch.bool)


def resampling_matrix(start, length, n_in, n_out):
    """(B, n_out, n_in): row i holds the weights of output pixel i, for crops start, length (B,).

    A triangle filter as wide as the reduction, the same as BILINEAR in Pillow; rows sum to 1.
    """
    # w_ij = max(0, 1 - |j - c_i| / max(step, 1)): how much input pixel j counts in output pixel i.
    # F.interpolate has one size for a whole batch. grid_sample can cut each image differently, but
    # it weighs four pixels, however many a view's pixel covers: thin lines would be lost in places.
    step = (length * n_in / n_out)[:, None]  # (B, 1), input pixels of an output pixel
    out = torch.arange(n_out, device=start.device) + 0.5
    # Pixel j covers j to j + 1, so its centre is at j + 1/2. Without the halves every view would be
    # shifted by a part of a pixel, and maps of another resolution by another part.
    centre = (start * n_in)[:, None] + out * step - 0.5  # (B, n_out)
    distance = torch.arange(n_in, device=start.device) - centre[:, :, None]  # (B, n_out, n_in)
    # A triangle narrower than a pixel would miss them all where a crop is enlarged: hence the
    # clamp. Some of a triangle lies outside of the picture at its border, so the weights are
    # divided by their sum.
    weight = (1 - distance.abs() / step.clamp(min=1)[:, :, None]).clamp(min=0)
    return weight / weight.sum(2, keepdim=True)


def view_matrices(boxes, flip, n_in, n_out):
    """Wy (B, n_out, n_in) and Wx (B, n_in, n_out): view = Wy @ image @ Wx."""
    Wy = resampling_matrix(boxes[:, 0], boxes[:, 2], n_in, n_out)
    Wx = resampling_matrix(boxes[:, 1], boxes[:, 3], n_in, n_out)
    # To mirror a view is to write its columns in reverse order, which costs nothing here.
    Wx = torch.where(flip[:, None, None], Wx.flip(1), Wx)
    return Wy, Wx.transpose(1, 2)


def view_images(images, boxes, flip, side):
    """images u8 (B, S, S, 3) -> views u8 (B, s, s, 3) of side s, on the same device."""
    B, S = images.shape[:2]
    boxes, flip = send(boxes, images.device), send(flip, images.device)
    # Crop, resizing and flip are linear in the pixels and treat the two axes apart, so they are
    # two batched matrix products: fast on every device, and the same formula on all of them.
    Wy, Wx = view_matrices(boxes, flip, S, side)
    lines = (Wy @ images.flatten(2).float()).view(B, side, S, 3)
    view = lines.transpose(2, 3).reshape(B, side * 3, S) @ Wx  # (B, s * 3, s)
    view = view.view(B, side, 3, side).transpose(2, 3)
    view = view.contiguous()  # colours last, as in kernels/
    # Back to bytes: what is read most in a step takes a quarter of the memory of fp32, the
    # encoder's input and the loss's target have the same values, and flat colour is exactly flat.
    return view.round_().clamp_(0, 255).to(torch.uint8)


def jitter_colour(images, draws, level, colourless=0.0):
    """images u8 (B, S, S, 3): brightness, contrast, saturation times 1 +- level. The hue stays.

    draws (B, 3) in [0, 1], or (B, 4), where a share `colourless` of the images loses its colours.
    """
    # The hue stays, because the colours of hair and eyes tell characters apart.
    factors = 1 - level + 2 * level * draws[:, :3]
    # Comics are gray. With a tenth of the crops in gray, seven characters were recognised in gray
    # pictures at 63.1 instead of 31.0 % (fine-tuning on faces20, dev).
    if colourless:
        factors[draws[:, 3] < colourless, 2] = 0.0
    factors = send(factors, images.device)
    brightness, contrast, saturation = factors.T[..., None, None, None]  # (B, 1, 1, 1) each
    x = images.float()
    red, green, blue = x.split(1, dim=3)
    gray = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue  # (B, S, S, 1)
    x = gray + saturation * (x - gray)
    mean = x.mean((1, 2, 3), keepdim=True)
    return ((mean + contrast * (x - mean)) * brightness).round().clamp(0, 255).to(torch.uint8)


def swap_backgrounds(view, fg):
    """Views u8 (B, s, s, 3), each with the background of the view before it in the batch.

    fg (B, s, s, 1) is 1 on the figure. Where the other view has its figure, its mean background
    colour is taken, or black where all of it is figure (BG_Random; Ryali et al. 2021, arXiv:2103.12719).
    """
    # Two drawings are most easily told apart by their backgrounds. If both views of a picture had
    # the same one, the contrastive loss would be solved by it, and attention would go there.
    x = view.float()
    bg = 1 - fg
    colour = (bg * x).sum((1, 2), keepdim=True) / bg.sum((1, 2), keepdim=True).clamp(min=1e-3)
    background = (bg * x + fg * colour).round().to(torch.uint8)  # the figure is painted over
    return (fg * x + bg * background.roll(1, 0)).round().to(torch.uint8)


def view_maps(maps, boxes, flip, side):
    """maps (B, G, G) of whole images -> fp32 (B, s, s), cropped and flipped as the images."""
    # The boxes of the images, at another resolution: so a map of the whole image serves every crop.
    boxes, flip = send(boxes, maps.device), send(flip, maps.device)
    Wy, Wx = view_matrices(boxes, flip, maps.shape[-1], side)
    return Wy @ maps.float() @ Wx


def read_view(picture, size):
    """One picture of any size -> a view u8 (1, size, size, 3), the same as of a packed set.

    picture: a path, an image of Pillow, or pixels u8 (H, W, 3). The square in its middle is cut out,
    and transparent pixels become white. A UserError where it can't be read.
    """
    # Imported here for the reason of open_or_pack: loops read packed sets, a notebook one picture.
    from ingest.decode import PACKED, centre_of

    # Resized twice, as pictures of a packed set are: first for the file, and then for the network.
    pixels = torch.from_numpy(centre_of(picture, max(PACKED, size)).copy())
    return view_images(pixels[None], *full_boxes(1), size)


def evenly_spaced(n, most):
    """Indices of at most `most` of n things, from the first to the last."""
    # Sets are often sorted by class, so the first `most` of them would be a few classes.
    return torch.linspace(0, n - 1, min(n, most)).long()


def evenly_of_each(labels, most):
    """labels (n,) -> for each label the places of some pictures (k,): at most so many, evenly spaced."""
    of_each = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    return [some[evenly_spaced(len(some), most)] for some in of_each]


def whole_views(images, indices, side, device, name=""):
    """Yield (index, view u8 (B, s, s, 3)) of whole images, i64 indices in order; name: of a bar."""
    for index in progress(indices.split(CHUNK), name, leave=False, disable=not name):
        yield index, view_images(take(images, index, device), *full_boxes(len(index)), side)


if __name__ == "__main__":
    from ingest.pack import main  # the command of this file packs; the code for that is there

    cli(main)
