"""CLAE in lightly's SimCLR: their transform, data set and projection head, one step exchanged.

Install: pip install "clae-fast[train]" lightly
Run:     python examples/lightly_simclr.py                  (five minutes on 2 CPU cores)
"""

import argparse

import torch
from lightly.data import LightlyDataset
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18
from torchvision.transforms.functional import to_pil_image

from clae_fast import NTXentLoss, clae_step, convert_dual_batchnorm, strip_dual_batchnorm
from clae_fast.pretraining import encode_images, mnist5k, weighted_knn


class Digits(TensorDataset):
    transform = None  # LightlyDataset puts it here

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor]:
        image, label = super().__getitem__(index)
        return self.transform(to_pil_image(image).convert("RGB")), label


class SimCLR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        self.projection_head = SimCLRProjectionHead(512, 512, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--limit", type=int, help="train on so many images (default: all 4,000)")
    parser.add_argument("--eps", type=float, default=0.03, help="in normalised units")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    data = mnist5k()
    chosen = torch.randperm(len(data.train_images))[: args.limit]  # they are stored by digit
    # A mirrored digit is another shape, a blurred one is hard to see: no flip, no blur.
    views = SimCLRTransform(28, min_scale=0.3, gaussian_blur=0, hf_prob=0, rr_prob=1, rr_degrees=15)
    digits = Digits(data.train_images[chosen], data.train_labels[chosen])
    dataset = LightlyDataset.from_torch_dataset(digits, transform=views)
    loader = DataLoader(dataset, min(args.batch_size, len(digits)), shuffle=True, drop_last=True)

    # lightly alone                           with CLAE
    # from lightly.loss import NTXentLoss     from clae_fast import NTXentLoss  (the same number)
    # model = SimCLR()                        model = convert_dual_batchnorm(SimCLR())
    # loss = criterion(model(x0), model(x1))  loss = clae_step(model, x0, x1, loss=criterion).loss
    # (after training)                        strip_dual_batchnorm(model)
    model = convert_dual_batchnorm(SimCLR()).to(device)  # the head's BatchNorm1d too
    criterion = NTXentLoss(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(args.epochs):
        total_loss = 0.0
        for (x0, x1), _, _ in loader:
            loss = clae_step(model, x0.to(device), x1.to(device), loss=criterion, eps=args.eps).loss
            total_loss += loss.item()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {total_loss / len(loader):.4f}")

    strip_dual_batchnorm(model).cpu().eval()  # an ordinary model again
    train, test = (
        encode_images(model.backbone, x.expand(-1, 3, -1, -1), *IMAGENET_NORMALIZE.values())
        for x in (data.train_images[chosen], data.test_images)
    )
    accuracy = weighted_knn(train, data.train_labels[chosen], test, data.test_labels)
    print(f"weighted kNN accuracy {accuracy:.3f}")
    return total_loss / len(loader)


if __name__ == "__main__":
    main()
