"""CLAE in a training loop of plain PyTorch: own data, own views, own model.

Install: pip install "clae-fast[train]" (for the MNIST images; the loop itself needs only torch)
Run:     python examples/bare_pytorch.py                    (one minute on 2 CPU cores)
         python examples/bare_pytorch.py --epochs 2 --limit 512 --eps 0.1
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clae_fast import NTXentLoss, clae_step, convert_dual_batchnorm, strip_dual_batchnorm
from clae_fast.pretraining import encode_images, mnist5k, weighted_knn


def random_view(x: Tensor) -> Tensor:
    """Turn, scale, shear, shift and dim each image of (B, 1, H, W) in its own way."""
    noise = 0.2 * (2 * torch.rand(len(x), 2, 3, device=x.device) - 1)
    grid = F.affine_grid(torch.eye(2, 3, device=x.device) + noise, x.shape, align_corners=False)
    brightness = 0.4 + 0.6 * torch.rand(len(x), 1, 1, 1, device=x.device)
    return brightness * F.grid_sample(x, grid, align_corners=False)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        )
        self.projector = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.features(x))


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--limit", type=int, help="train on so many images (default: all 4,000)")
    parser.add_argument("--eps", type=float, default=0.03, help="in normalised units")
    parser.add_argument("--output", type=Path, default=Path("runs/bare_pytorch.pt"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    data = mnist5k()
    shift, scale = data.mean[0], data.std[0]
    chosen = torch.randperm(len(data.train_images))[: args.limit]  # they are stored by digit
    images = data.train_images[chosen].to(device).float() / 255

    encoder = convert_dual_batchnorm(Encoder()).to(device)  # before the optimizer is built
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    loss = NTXentLoss(0.5)
    for epoch in range(args.epochs):
        losses = []
        for x in images[torch.randperm(len(images))].split(args.batch_size):
            x_i, x_j = ((random_view(x) - shift) / scale for _ in range(2))
            out = clae_step(encoder, x_i, x_j, loss=loss, eps=args.eps)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
        mean_loss = sum(losses) / len(losses)
        print(f"epoch {epoch + 1}: loss {mean_loss:.4f}")

    strip_dual_batchnorm(encoder).cpu().eval()  # an ordinary model again
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(encoder.state_dict(), args.output)

    train, test = (
        encode_images(encoder.features, x, data.mean, data.std)
        for x in (data.train_images[chosen], data.test_images)
    )
    accuracy = weighted_knn(train, data.train_labels[chosen], test, data.test_labels)
    print(f"weighted kNN accuracy {accuracy:.3f}; weights in {args.output}")
    return mean_loss


if __name__ == "__main__":
    main()
