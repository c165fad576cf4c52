r"""CLAE for an encoder of timm, chosen by name, with a projector behind it.

Install: pip install "clae-fast[train]" timm
Run:     python examples/timm_encoder.py                    (five minutes on 2 CPU cores)
         python examples/timm_encoder.py --model convnext_atto --size 32
         python examples/timm_encoder.py --model vit_tiny_patch16_224 --lr 3e-4 \
             --model-kwargs img_size=28 patch_size=7

Which models: nn.BatchNorm2d (resnet18 to resnet152) gets its auxiliary twin; a model without
BatchNorm (most vit_*, convnext_*, *_gn) needs none and shares every layer. One with timm's
BatchNormAct2d (most efficientnet_*, mobilenet*, regnet*, resnetv2_*) ends in an error with the name
of the layer: a BatchNorm that contains an activation is none that clae_fast knows.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from clae_fast import NTXentLoss, clae_step, convert_dual_batchnorm, strip_dual_batchnorm
from clae_fast.pretraining import encode_images, mnist5k, weighted_knn


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="as in timm.list_models()")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    parser.add_argument("--size", type=int, default=28, help="side of the images")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--limit", type=int, help="train on so many images (default: all 4,000)")
    parser.add_argument("--eps", type=float, default=0.03, help="in normalised units")
    parser.add_argument("--output", type=Path, default=Path("runs/timm_encoder.pt"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    data = mnist5k()
    chosen = torch.randperm(len(data.train_images))[: args.limit]  # they are stored by digit
    plain = v2.Compose(
        [v2.Resize(args.size), v2.ToDtype(torch.float32, True), v2.Normalize(data.mean, data.std)]
    )
    affine = v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=15)
    view = v2.Compose([affine, v2.ColorJitter(0.7, 0.7), plain])

    def two_views(images: list[Tensor]) -> list[Tensor]:
        return [torch.stack([view(x) for x in images]) for _ in range(2)]

    images, batch = data.train_images[chosen], min(args.batch_size, len(chosen))
    loader = DataLoader(images, batch, shuffle=True, drop_last=True, collate_fn=two_views)

    backbone = timm.create_model(args.model, num_classes=0, in_chans=1, **args.model_kwargs)
    width = backbone.head_hidden_size
    projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64))
    encoder = convert_dual_batchnorm(nn.Sequential(backbone, projector)).to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=args.lr)
    loss = NTXentLoss(0.5)
    for epoch in range(args.epochs):
        total = 0.0
        for x_i, x_j in loader:
            out = clae_step(encoder, x_i.to(device), x_j.to(device), loss=loss, eps=args.eps)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            total += out.loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}")

    strip_dual_batchnorm(encoder).cpu().eval()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(backbone.state_dict(), args.output)  # timm.create_model(...) loads it

    train, test = (
        encode_images(backbone, x, data.mean, data.std, image_size=args.size)
        for x in (images, data.test_images)
    )
    accuracy = weighted_knn(train, data.train_labels[chosen], test, data.test_labels)
    print(f"weighted kNN accuracy {accuracy:.3f}; weights in {args.output}")
    return total / len(loader)


if __name__ == "__main__":
    main()
