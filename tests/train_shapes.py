"""Train a small network on scenes whose answer is known: one of six shapes on a cluttered background.

    python tests/train_shapes.py                    # train, write tests/data/shapes_shufflenet_v2_x0_5.pth (minutes)
    python tests/train_shapes.py --table            # play the pointing game with all methods (minutes)
    python tests/train_shapes.py --scenes FOLDER    # write 300 scenes as pictures, in a folder for each class

The pointing game (Zhang et al., "Top-down Neural Attention by Excitation Backprop", arXiv:1608.00507) counts how often
the peak of a map lies on the shape. tests/test_truth.py holds the program to it. In percent of 300 scenes with one
shape, and of 300 questions about scenes with two, of which one is asked for:

                                                            one shape   two: the one asked for   the other one
    gradcam, xgradcam, ablationcam, hirescam, shapleycam    95 to 96    91                       0
    gradcam++, layercam, gradcamelementwise, refinecam      96          89                       4
    finercam                                                92          90                       1
    eigengradcam                                            96          82                       5
    scorecam; segeigencam                                   96          71; 70                   25; 28
    eigencam, fem, kpcacam                                  96          49                       49
    randomcam; a peak at random                             49; 7       39; 7                    39; 7

The network was trained to have its evidence where the shape is. So the first column tells that a map is put in the
right place, and only the second one what a method knows of the class: one that does not ask for it comes to half.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models import get_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cnn_visualizations import METHODS, MORE_METHODS, Explainer, load_classifier

ARCH = "shufflenet_v2_x0_5"
CKPT = ROOT / "tests" / "data" / f"shapes_{ARCH}.pth"
CLASSES = ("circle", "square", "triangle", "star", "cross", "ring")
SIDE = 161  # of the form 32k + 1, where padding puts the cells of the last layer symmetrically: 6 x 6 of them
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
seed = 1337
rounds = 64  # of 512 new scenes; each is seen twice, turned and with its colours exchanged
batch_size = 32
learning_rate = 2e-3
channels = 128  # of the last layer's 1024 are in use; Score-CAM asks the network once for each
in_place = 1.0  # weight of the loss's second term: no evidence where the shape is not


def make_background(rng, hard=1.0):
    """Return noise from coarse to fine, lines and soft blobs, float32 (SIDE, SIDE, 3); with hard=0 plain and dark."""
    picture = np.full(
        (SIDE, SIDE, 3), hard * rng.uniform(0.2, 0.8, 3) + (1 - hard) * 0.2, np.float32
    )
    for cells in (2, 5, 12, 40, SIDE):
        noise = rng.standard_normal((cells, cells, 3), np.float32) * np.float32(
            hard * rng.uniform(0.02, 0.06)
        )
        picture += cv2.resize(noise, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    for _ in range(round(hard * rng.integers(2, 6))):
        points = rng.uniform(0, SIDE, (1, rng.integers(2, 4), 2)).astype(np.int32)
        cv2.polylines(
            picture,
            points,
            False,
            rng.uniform(0, 1, 3).tolist(),
            int(rng.integers(1, 4)),
            cv2.LINE_AA,
        )
    for _ in range(round(hard * rng.integers(0, 3))):
        width = SIDE * rng.uniform(0.04, 0.09)
        rows, columns = (
            np.exp(-(((np.arange(SIDE) - at) / width) ** 2) / 2) for at in rng.uniform(0, SIDE, 2)
        )
        blob = np.outer(rows, columns).astype(np.float32)[..., None]
        picture += blob * (rng.uniform(0, 1, 3).astype(np.float32) - picture)
    return picture


def outline(shape, angle):
    """Return the corners of a shape in the unit circle, (corners, 2)."""
    radii = {
        "square": [1] * 4,
        "triangle": [1] * 3,
        "star": [1, 0.45] * 5,
        "cross": [1, 1, 0.4] * 4,
    }
    radii = np.array(radii.get(shape, [1] * 48))
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    if shape == "cross":  # two corners at the end of each arm, one between the arms
        angles = np.concatenate(
            [quarter + np.array([-0.3, 0.3, np.pi / 4]) for quarter in np.arange(4) * np.pi / 2]
        )
    return np.stack([np.cos(angles + angle), np.sin(angles + angle)], 1) * radii[:, None]


def draw_shape(picture, rng, shape, centre, radius, hard=1.0):
    """Draw into the picture. Return the mask of the shape's convex hull: a peak in the hole of a ring is right."""
    corners = np.int32(
        16 * (centre + radius * outline(shape, rng.uniform(0, 2 * np.pi)))
    )  # in sixteenths of a pixel
    inside, alpha = np.zeros((2, SIDE, SIDE), np.uint8)
    cv2.fillConvexPoly(inside, cv2.convexHull(corners), 255, cv2.LINE_AA, 4)
    cv2.fillPoly(alpha, [corners], 255, cv2.LINE_AA, 4)
    if shape == "ring":
        cv2.fillPoly(
            alpha, [np.int32(16 * (centre + 0.6 * radius * outline(shape, 0)))], 0, cv2.LINE_AA, 4
        )
    mask, colour = inside > 127, rng.uniform(0, 1, 3)
    while np.abs(colour - picture[mask].mean(0)).max() < 0.5:  # too little contrast
        colour = rng.uniform(0, 1, 3)
    colour = np.float32(hard * colour + (1 - hard) * 0.9)
    picture += np.float32(alpha / 255 * rng.uniform(0.8, 1))[..., None] * (colour - picture)
    return mask


def make_shapes(rng, count, hard=1.0):
    """Return a scene with shapes of different classes: pixels uint8 (SIDE, SIDE, 3), labels (count,), masks."""
    picture = make_background(rng, hard)
    labels = rng.permutation(len(CLASSES))[:count]
    masks, places = [], []
    while len(masks) < count:
        radius = SIDE * (hard * rng.uniform(1 / 8, 1 / 5) + (1 - hard) * 0.3)
        centre = rng.uniform(radius, SIDE - radius, 2)
        if all(np.hypot(*(centre - other)) > radius + size + SIDE / 20 for other, size in places):
            places.append((centre, radius))
            masks.append(
                draw_shape(picture, rng, CLASSES[labels[len(masks)]], centre, radius, hard)
            )
    return np.uint8(255 * picture.clip(0, 1)), labels, np.stack(masks)


def make_scene(rng, hard=1.0):
    """Return a scene with one shape: pixels uint8 (SIDE, SIDE, 3), its label, its mask bool (SIDE, SIDE)."""
    pixels, labels, masks = make_shapes(rng, 1, hard)
    return pixels, int(labels[0]), masks[0]


def held_out(count):
    """Return scenes of one shape that are not trained on, and as many of two shapes, asked for one after the other."""
    scenes = [make_scene(np.random.default_rng((seed, 0, number))) for number in range(count)]
    pairs = [
        make_shapes(np.random.default_rng((seed, 1, number)), 2) for number in range(count // 2)
    ]
    return scenes, [
        (pixels, int(labels[i]), masks[i]) for pixels, labels, masks in pairs for i in (0, 1)
    ]


def as_inputs(pixels):
    """Return pictures, uint8 (N, H, W, 3), as the network's input: float32 (N, 3, H, W), normalised."""
    pixels = torch.from_numpy(np.asarray(pixels)).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# --- the pointing game -----------------------------------------------------------------------------------------------


def peak(cam):
    """Return row and column of a map's peak, or None for a map of zeros.

    It is the middle of all pixels that share the maximum: at the border, enlarging makes a plateau of half a cell.
    """
    top = np.argwhere(cam > 1 - 1e-5)
    return tuple(top.mean(0).round().astype(int)) if len(top) else None


def find_peaks(explainer, scenes):
    """Return for each method of the explainer the peaks of its maps, for the classes of the scenes."""
    peaks = {method: [] for method in explainer.methods}
    for start in range(0, len(scenes), 20):
        pixels, labels, _ = zip(*scenes[start : start + 20], strict=True)
        for method, cams in explainer(as_inputs(pixels), labels).cams.items():
            peaks[method] += map(peak, cams)
    return peaks


def share_on(masks, peaks):
    """Return the share of the peaks that are on their masks; a map of zeros has no peak and is a miss."""
    return float(
        np.mean([at is not None and mask[at] for mask, at in zip(masks, peaks, strict=True)])
    )


def pointing_game(explainer, scenes):
    """Return for each method of the explainer the share of scenes in which the map's peak is on the shape."""
    masks = [mask for _, _, mask in scenes]
    return {
        method: share_on(masks, peaks) for method, peaks in find_peaks(explainer, scenes).items()
    }


def print_table(count=300):
    """Print the shares of all methods as a Markdown table, with those of a peak at random in the last line."""
    torch.set_num_threads(1)  # so small a network gains nothing from a second one
    scenes, pairs = held_out(count)
    methods = [
        *METHODS,
        *(method for method in MORE_METHODS if method != "fullgrad"),
    ]  # which takes a second each
    explainer = Explainer(
        load_classifier(ckpt=CKPT, device="cpu").model, methods, guided=False, batch_size=32
    )
    masks, asked = ([mask for _, _, mask in side] for side in (scenes, pairs))
    other = [asked[index ^ 1] for index in range(count)]
    of_scenes, of_pairs = find_peaks(explainer, scenes), find_peaks(explainer, pairs)
    print(
        "| method | one shape: peak on it | two: on the one asked for | on the other one |\n|---|---|---|---|"
    )
    for method in methods:
        sides = (masks, of_scenes), (asked, of_pairs), (other, of_pairs)
        shares = [share_on(wanted, peaks[method]) for wanted, peaks in sides]
        print(f"| {method} | {' | '.join(f'{100 * share:.0f} %' for share in shares)} |")
    print(
        f"| (at random) | {' | '.join(f'{100 * np.mean(wanted):.0f} %' for wanted in (masks, asked, other))} |"
    )


# --- training --------------------------------------------------------------------------------------------------------


def train():
    """Train from scratch, from plain scenes to cluttered ones: on the cluttered ones alone it learns nothing.

    A cell of the last layer reads nearly the whole picture, and without the loss's second term it is often the cell
    beside the shape that tells its class: Grad-CAM's peak then lay on the shape in a third of the scenes, though what
    that cell reads lay there in 94 of 100. With it the place of the evidence is known, and the maps can be judged.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the same sums in the same order, on any number of cores
    model = get_model(ARCH, num_classes=len(CLASSES)).to(memory_format=torch.channels_last)
    model.conv5[1].weight.data[channels:] = (
        0  # zero before a ReLU they get no gradient, and stay zero
    )
    activations = []
    model.conv5.register_forward_hook(
        lambda module, args, output: activations.append(output[:, :channels])
    )
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.02)
    steps = rounds * 2 * 512 // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    hard = 0.0
    for number in range(rounds):
        scenes = [
            make_scene(np.random.default_rng((seed, 2 + number, index)), hard)
            for index in range(512)
        ]
        inputs, labels = (
            as_inputs([pixels for pixels, _, _ in scenes]),
            torch.tensor([label for _, label, _ in scenes]),
        )
        masks = torch.from_numpy(np.stack([mask for _, _, mask in scenes])).float()
        outside = nn.functional.interpolate(
            masks[:, None], (6, 6), mode="area"
        )  # the cells of the last layer
        outside = 1 - outside / outside.amax((2, 3), keepdim=True)
        right = 0
        for quarters, batch in enumerate(
            torch.cat([torch.randperm(512), torch.randperm(512)]).split(batch_size)
        ):
            x = torch.rot90(inputs[batch], quarters, (2, 3))[:, torch.randperm(3)]
            logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits, labels[batch])
            loss = (
                loss
                + in_place
                * (activations.pop() * torch.rot90(outside[batch], quarters, (2, 3))).mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += (logits.argmax(1) == labels[batch]).sum().item()
        print(
            f"round {number + 1} of {rounds}: hardness {hard:.1f}, {right / 1024:.3f} right",
            flush=True,
        )
        if right / 1024 > 0.7:
            hard = min(1.0, hard + 0.1)
        state = {
            key: value.half() if value.is_floating_point() else value
            for key, value in model.state_dict().items()
        }
        torch.save(
            {"arch": ARCH, "classes": list(CLASSES), "input_size": SIDE, "state_dict": state}, CKPT
        )


@torch.inference_mode()
def accuracy(model, scenes):
    """Return the share of scenes whose class is predicted."""
    answers = torch.cat([model(as_inputs([pixels])).argmax(1) for pixels, _, _ in scenes])
    return (answers == torch.tensor([label for _, label, _ in scenes])).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--table", action="store_true", help="play the pointing game with the trained network"
    )
    parser.add_argument(
        "--scenes", type=Path, metavar="FOLDER", help="write 300 scenes, in a folder for each class"
    )
    args = parser.parse_args()
    if args.table:
        print_table()
    elif args.scenes:
        for number, (pixels, label, _) in enumerate(held_out(300)[0]):
            (args.scenes / CLASSES[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(args.scenes / CLASSES[label] / f"{number:03}.png")
    else:
        train()
        print(
            f"held-out accuracy {accuracy(load_classifier(ckpt=CKPT, device='cpu').model, held_out(1000)[0]):.3f}"
        )
