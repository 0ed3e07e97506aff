"""MultiGrain in a PyTorch training loop of one's own: no experiment file, no Ray, no MLflow.

Trains on 1,200 scans of handwritten digits that come with scikit-learn, and measures the other 597. Takes less than a
minute on two cores.
"""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

import multigrain

LAMBDA = 0.5  # weight of the classification; the margin loss has the rest
TRAIN, EPOCHS, COPIES = 1200, 3, 3

scans = load_digits()
grey = interpolate(torch.from_numpy(scans.images)[:, None] * (255 / 16), (32, 32), mode="bilinear")
images = grey.expand(-1, 3, -1, -1).to(torch.uint8)  # (N, 3, 32, 32)
labels = torch.from_numpy(scans.target)

torch.manual_seed(0)
network = multigrain.MultiGrain("narrow", num_classes=10, p=3.0)
margin_loss = multigrain.MarginLoss()  # its boundary beta is learnt, too
optimizer = torch.optim.SGD([*network.parameters(), *margin_loss.parameters()], lr=0.05, momentum=0.9)
augment = multigrain.TrainTransform(multigrain.AugmentSettings(flip=0.0, crop=0.4), size=32)
batches = multigrain.RepeatedAugmentationBatches(TRAIN, batch_size=96, repeats=COPIES, length_factor=1.0)

for epoch in range(EPOCHS):
    network.train()
    batches.set_epoch(epoch)
    for indices in batches:  # every image stands there three times, and gets three different views
        views, colours = zip(*(augment(images[index]) for index in indices), strict=True)
        output = network(multigrain.colour(torch.stack(views), torch.stack(colours)))
        triplets = multigrain.sample_triplets(output.descriptor, torch.tensor(indices))
        pairs, _ = margin_loss(output.descriptor, triplets)
        loss = LAMBDA * multigrain.classification_loss(output.logits, labels[indices]) + (1 - LAMBDA) * pairs
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    network.eval()
    with torch.no_grad():
        output = network(images[TRAIN:] / 255)
    top1 = (output.logits.argmax(dim=1) == labels[TRAIN:]).float().mean().item()
    found = output.descriptor.numpy()
    truth = multigrain.same_label(labels[TRAIN:].numpy())
    retrieval = multigrain.mean_average_precision(found, found, truth)
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, top1 {top1:.3f}, mAP of the same digit {retrieval:.3f}")
