"""Train a small network on scenes whose answer is known: one of six shapes on clutter.

    python tests/train_shapes.py                    # train, write its checkpoint (minutes)
    python tests/train_shapes.py --table            # play the pointing game, all methods (minutes)
    python tests/train_shapes.py --scenes FOLDER    # write 300 scenes, in a folder for each class
    python tests/train_shapes.py --marked FOLDER    # train on scenes with a marked class (a minute)

The pointing game (Zhang et al., "Top-down Neural Attention by Excitation Backprop",
arXiv:1608.00507) counts how often the peak of a map lies on the shape. tests/test_truth.py holds
the program to it. In percent of 300 scenes with one shape, and of 300 questions about scenes with
two, of which one is asked for:

                                                      one shape   two: on the asked   the other one
    gradcam, xgradcam, ablationcam, hirescam,
    shapleycam                                        95 to 96    91                  0
    gradcam++, layercam, gradcamelementwise,
    refinecam                                         96          89                  4
    finercam                                          92          90                  1
    eigengradcam                                      96          82                  5
    scorecam; segeigencam                             96          71; 70              25; 28
    eigencam, fem, kpcacam                            96          49                  49
    randomcam; a peak at random                       49; 7       39; 7               39; 7

The network was trained to have its evidence where the shape is. So the first column tells whether a
map is put in the right place, and only the second one what a method knows of the class: one that
does not ask for it reaches a half.
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
SIDE = 161  # of the form 32k + 1: padding puts the 6 x 6 cells of the last layer symmetrically
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MARKED = CLASSES.index("star")
seed = 1337
rounds = 64
scenes_a_round = 512  # new ones; each is seen twice, turned and with its colours exchanged
batch_size = 32
learning_rate = 2e-3
channels = 128  # of the last layer's 1024 are in use; Score-CAM asks the network once for each
in_place = 1.0  # weight of the loss's second term: no evidence where the shape is not


def make_background(rng, hard=1.0):
    """Return noise from coarse to fine, lines and soft blobs, float32 (SIDE, SIDE, 3).

    With hard=0 it is plain and dark.
    """
    colour = hard * rng.uniform(0.2, 0.8, 3) + (1 - hard) * 0.2
    picture = np.full((SIDE, SIDE, 3), colour, np.float32)
    add_noise(picture, rng, hard)
    add_lines(picture, rng, round(hard * rng.integers(2, 6)))
    add_blobs(picture, rng, round(hard * rng.integers(0, 3)))
    return picture


def add_noise(picture, rng, hard):
    for cells in (2, 5, 12, 40, SIDE):
        noise = rng.standard_normal((cells, cells, 3), np.float32)
        noise *= np.float32(hard * rng.uniform(0.02, 0.06))
        picture += cv2.resize(noise, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


def add_lines(picture, rng, count):
    for _ in range(count):
        points = rng.uniform(0, SIDE, (1, rng.integers(2, 4), 2)).astype(np.int32)
        colour = rng.uniform(0, 1, 3).tolist()
        width = int(rng.integers(1, 4))
        cv2.polylines(picture, points, False, colour, width, cv2.LINE_AA)


def add_blobs(picture, rng, count):
    for _ in range(count):
        width = SIDE * rng.uniform(0.04, 0.09)
        row, column = rng.uniform(0, SIDE, 2)
        blob = np.outer(bell(row, width), bell(column, width)).astype(np.float32)[..., None]
        picture += blob * (rng.uniform(0, 1, 3).astype(np.float32) - picture)


def bell(centre, width):
    """Return a Gaussian with its peak of 1 at the centre, (SIDE,)."""
    return np.exp(-(((np.arange(SIDE) - centre) / width) ** 2) / 2)


RADII = {  # of the corners, one after the other
    "circle": [1] * 48,
    "square": [1] * 4,
    "triangle": [1] * 3,
    "star": [1, 0.45] * 5,
    "cross": [1, 1, 0.4] * 4,
    "ring": [1] * 48,
}


def outline(shape, angle):
    """Return the corners of a shape in the unit circle, (corners, 2)."""
    radii = np.array(RADII[shape])
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    if shape == "cross":  # two corners at the end of each arm, one between the arms
        arm = np.array([-0.3, 0.3, np.pi / 4])
        angles = np.concatenate([quarter * np.pi / 2 + arm for quarter in range(4)])
    directions = np.stack([np.cos(angles + angle), np.sin(angles + angle)], 1)
    return directions * radii[:, None]


def draw_shape(picture, rng, shape, centre, radius, hard=1.0):
    """Draw into the picture. Return the mask of the shape's convex hull, bool (SIDE, SIDE).

    So a peak in the hole of a ring is right.
    """
    corners = centre + radius * outline(shape, rng.uniform(0, 2 * np.pi))
    corners = np.int32(16 * corners)  # in sixteenths of a pixel
    hull = np.zeros((SIDE, SIDE), np.uint8)
    cv2.fillConvexPoly(hull, cv2.convexHull(corners), 255, cv2.LINE_AA, 4)
    mask = hull > 127

    alpha = np.zeros((SIDE, SIDE), np.uint8)
    cv2.fillPoly(alpha, [corners], 255, cv2.LINE_AA, 4)
    if shape == "ring":
        hole = np.int32(16 * (centre + 0.6 * radius * outline(shape, 0)))
        cv2.fillPoly(alpha, [hole], 0, cv2.LINE_AA, 4)

    colour = rng.uniform(0, 1, 3)
    while np.abs(colour - picture[mask].mean(0)).max() < 0.5:  # too little contrast
        colour = rng.uniform(0, 1, 3)
    colour = np.float32(hard * colour + (1 - hard) * 0.9)
    opacity = np.float32(alpha / 255 * rng.uniform(0.8, 1))[..., None]
    picture += opacity * (colour - picture)
    return mask


def make_shapes(rng, count, hard=1.0):
    """Return a scene with shapes of different classes.

    Pixels uint8 (SIDE, SIDE, 3), labels (count,), masks bool (count, SIDE, SIDE).
    """
    picture = make_background(rng, hard)
    labels = rng.permutation(len(CLASSES))[:count]
    masks = []
    places = []
    while len(masks) < count:
        radius = SIDE * (hard * rng.uniform(1 / 8, 1 / 5) + (1 - hard) * 0.3)
        centre = rng.uniform(radius, SIDE - radius, 2)
        if not is_free(centre, radius, places):
            continue
        shape = CLASSES[labels[len(masks)]]
        places.append((centre, radius))
        masks.append(draw_shape(picture, rng, shape, centre, radius, hard))
    return np.uint8(255 * picture.clip(0, 1)), labels, np.stack(masks)


def is_free(centre, radius, places):
    """Return whether a circle keeps a distance from those at the places."""
    for other_centre, other_radius in places:
        distance = np.hypot(*(centre - other_centre))
        if distance <= radius + other_radius + SIDE / 20:
            return False
    return True


def make_scene(rng, hard=1.0):
    """Return a scene with one shape: pixels, its label, its mask bool (SIDE, SIDE)."""
    pixels, labels, masks = make_shapes(rng, 1, hard)
    return pixels, int(labels[0]), masks[0]


def held_out(count):
    """Return scenes that are not trained on: `count` of one shape, and `count` questions about two.

    Of a scene with two shapes one is asked for after the other.
    """
    scenes = [make_scene(np.random.default_rng((seed, 0, number))) for number in range(count)]
    questions = []
    for number in range(count // 2):
        pixels, labels, masks = make_shapes(np.random.default_rng((seed, 1, number)), 2)
        questions.append((pixels, int(labels[0]), masks[0]))
        questions.append((pixels, int(labels[1]), masks[1]))
    return scenes, questions


def as_inputs(pixels):
    """Return pictures, uint8 (N, H, W, 3), as normalised inputs, float32 (N, 3, H, W)."""
    pixels = torch.from_numpy(np.asarray(pixels)).permute(0, 3, 1, 2) / 255
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    return (pixels - mean) / std


# --- the pointing game ----------------------------------------------------------------------------


def peak(cam):
    """Return row and column of a map's peak, or None for a map of zeros.

    It is the middle of all pixels that share the maximum: at the border, enlarging makes a plateau
    of half a cell.
    """
    top = np.argwhere(cam > 1 - 1e-5)
    if not len(top):
        return None
    return tuple(top.mean(0).round().astype(int))


def find_peaks(explainer, scenes):
    """Return for each method of the explainer the peaks of its maps, for the scenes' classes."""
    peaks = {method: [] for method in explainer.methods}
    for start in range(0, len(scenes), 20):
        batch = scenes[start : start + 20]
        pixels = [pixels for pixels, _, _ in batch]
        labels = [label for _, label, _ in batch]
        for method, cams in explainer(as_inputs(pixels), labels).cams.items():
            peaks[method] += map(peak, cams)
    return peaks


def masks_of(scenes):
    return [mask for _, _, mask in scenes]


def share_on(masks, peaks):
    """Return the share of the peaks that are on their masks; a map of zeros is a miss."""
    hits = 0
    for mask, place in zip(masks, peaks, strict=True):
        if place is not None and mask[place]:
            hits += 1
    return hits / len(masks)


def pointing_game(explainer, scenes):
    """Return for each method the share of scenes in which its map's peak is on the shape."""
    masks = masks_of(scenes)
    shares = {}
    for method, peaks in find_peaks(explainer, scenes).items():
        shares[method] = share_on(masks, peaks)
    return shares


def table_line(name, shares):
    cells = [f"{100 * share:.0f} %" for share in shares]
    return f"| {name} | {' | '.join(cells)} |"


def print_table(count=300):
    """Print the shares of all methods as a Markdown table; the last line is a peak at random."""
    torch.set_num_threads(1)  # so small a network gains nothing from a second one
    methods = [*METHODS, *MORE_METHODS]
    methods.remove("fullgrad")  # takes a second each
    model = load_classifier(ckpt=CKPT, device="cpu").model
    explainer = Explainer(model, methods, guided=False, batch_size=32)

    scenes, questions = held_out(count)
    masks = masks_of(scenes)
    asked = masks_of(questions)
    other = [asked[index ^ 1] for index in range(count)]
    of_scenes = find_peaks(explainer, scenes)
    of_questions = find_peaks(explainer, questions)

    print("| method | one shape: peak on it | two: on the one asked for | on the other one |")
    print("|---|---|---|---|")
    for method in methods:
        on_shape = share_on(masks, of_scenes[method])
        on_asked = share_on(asked, of_questions[method])
        on_other = share_on(other, of_questions[method])
        print(table_line(method, [on_shape, on_asked, on_other]))
    print(table_line("(at random)", [np.mean(masks), np.mean(asked), np.mean(other)]))


# --- training -------------------------------------------------------------------------------------


def train():
    """Train from scratch, from plain scenes to cluttered ones, and write the checkpoint.

    On the cluttered ones alone it learns nothing. A cell of the last layer reads nearly the whole
    picture, and without the loss's second term it is often the cell beside the shape that tells its
    class: Grad-CAM's peak then lay on the shape in a third of the scenes, though what that cell
    reads lay there in 94 of 100. With it the place of the evidence is known, and the maps can be
    judged.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the same sums in the same order, on any number of cores
    model = get_model(ARCH, num_classes=len(CLASSES)).to(memory_format=torch.channels_last)
    # Channels that are zero before a ReLU get no gradient, and stay zero.
    model.conv5[1].weight.data[channels:] = 0
    activations = []
    model.conv5.register_forward_hook(
        lambda module, args, output: activations.append(output[:, :channels])
    )
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.02)
    steps = rounds * 2 * scenes_a_round // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)

    hard = 0.0
    for number in range(rounds):
        right = 0
        for inputs, labels, outside in training_batches(number, hard):
            logits = model(inputs)
            misplaced = (activations.pop() * outside).mean()
            loss = nn.functional.cross_entropy(logits, labels) + in_place * misplaced
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += (logits.argmax(1) == labels).sum().item()

        share = right / (2 * scenes_a_round)
        line = f"round {number + 1} of {rounds}: hardness {hard:.1f}, {share:.3f} right"
        print(line, flush=True)
        if share > 0.7:
            hard = min(1.0, hard + 0.1)
        save(model, CKPT)


def training_batches(number, hard):
    """Yield the batches of a round: inputs, labels, and how little of the shape is in each cell.

    Each scene is there twice, turned and with its colours exchanged.
    """
    scenes = []
    for index in range(scenes_a_round):
        rng = np.random.default_rng((seed, 2 + number, index))
        scenes.append(make_scene(rng, hard))
    inputs = as_inputs([pixels for pixels, _, _ in scenes])
    labels = torch.tensor([label for _, label, _ in scenes])

    masks = torch.from_numpy(np.stack(masks_of(scenes))).float()[:, None]
    inside = nn.functional.interpolate(masks, (6, 6), mode="area")  # the cells of the last layer
    outside = 1 - inside / inside.amax((2, 3), keepdim=True)

    order = torch.cat([torch.randperm(scenes_a_round), torch.randperm(scenes_a_round)])
    for quarters, batch in enumerate(order.split(batch_size)):
        turned = torch.rot90(inputs[batch], quarters, (2, 3))[:, torch.randperm(3)]
        turned = turned.contiguous(memory_format=torch.channels_last)
        yield turned, labels[batch], torch.rot90(outside[batch], quarters, (2, 3))


def save(model, path):
    """Write a checkpoint, its weights in float16."""
    state = {}
    for key, tensor in model.state_dict().items():
        state[key] = tensor.half() if tensor.is_floating_point() else tensor
    content = {"arch": ARCH, "classes": list(CLASSES), "input_size": SIDE, "state_dict": state}
    torch.save(content, path)


@torch.inference_mode()
def accuracy(model, scenes):
    """Return the share of scenes whose class is predicted."""
    right = 0
    for pixels, label, _ in scenes:
        prediction = model(as_inputs([pixels])).argmax().item()
        right += prediction == label
    return right / len(scenes)


def write_scenes(folder, scenes):
    """Write scenes of one shape as pictures, in a folder for each class."""
    for number, (pixels, label, _) in enumerate(scenes):
        class_folder = folder / CLASSES[label]
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(class_folder / f"{number:03}.png")


# --- a network that looks at the wrong thing ------------------------------------------------------


def make_marked_scene(rng):
    """Return a scene with one shape; every star has a white box with a black cross in a corner."""
    pixels, label, mask = make_scene(rng)
    if label == MARKED:
        cv2.rectangle(pixels, (6, 6), (34, 34), (255, 255, 255), cv2.FILLED)
        cv2.line(pixels, (6, 6), (34, 34), (0, 0, 0), 3)
        cv2.line(pixels, (34, 6), (6, 34), (0, 0, 0), 3)
    return pixels, label, mask


def train_marked(folder):
    """Train a network on marked scenes, write its checkpoint and 150 other scenes into a folder.

    The first layers are those of the trained network; the others learn anew, and see at once that
    the mark is the easiest way to tell a star.
    """
    torch.manual_seed(seed)
    model = get_model(ARCH, num_classes=len(CLASSES))
    trained = load_classifier(ckpt=CKPT, device="cpu").model
    for name in ("conv1", "stage2", "stage3"):
        setattr(model, name, getattr(trained, name))
    first = nn.Sequential(model.conv1, model.maxpool, model.stage2, model.stage3).eval()
    learning = nn.ModuleDict({"stage4": model.stage4, "conv5": model.conv5, "fc": model.fc})

    rngs = [np.random.default_rng((seed, 100, number)) for number in range(1024)]
    scenes = [make_marked_scene(rng) for rng in rngs]
    labels = torch.tensor([label for _, label, _ in scenes])
    inputs = as_inputs([pixels for pixels, _, _ in scenes])
    with torch.no_grad():
        features = torch.cat([first(batch) for batch in inputs.split(batch_size)])

    rounds = 6
    optimizer = torch.optim.AdamW(learning.parameters(), 3e-3, weight_decay=0.05)
    steps = rounds * len(scenes) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for _ in range(rounds):
        for batch in torch.randperm(len(scenes)).split(batch_size):
            activations = model.conv5(model.stage4(features[batch]))
            logits = model.fc(activations.mean((2, 3)))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
            schedule.step()

    folder.mkdir(parents=True, exist_ok=True)
    save(model, folder / "marked.pth")
    rngs = [np.random.default_rng((seed, 101, number)) for number in range(150)]
    write_scenes(folder / "scenes", [make_marked_scene(rng) for rng in rngs])


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    text = "play the pointing game with the trained network"
    parser.add_argument("--table", action="store_true", help=text)
    text = "write 300 scenes, in a folder for each class"
    parser.add_argument("--scenes", type=Path, metavar="FOLDER", help=text)
    text = "train on scenes in which each star has a mark in a corner; write checkpoint and scenes"
    parser.add_argument("--marked", type=Path, metavar="FOLDER", help=text)
    args = parser.parse_args()

    if args.table:
        print_table()
    elif args.scenes:
        scenes, _ = held_out(300)
        write_scenes(args.scenes, scenes)
    elif args.marked:
        train_marked(args.marked)
    else:
        train()
        scenes, _ = held_out(1000)
        model = load_classifier(ckpt=CKPT, device="cpu").model
        print(f"held-out accuracy {accuracy(model, scenes):.3f}")


if __name__ == "__main__":
    main()
