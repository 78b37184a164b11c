"""What test_oldest_torch.py sends to the emulated side: the whole main job on the oldest torch that armopt takes."""

import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(16)
        self.up = torch.nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.fc = torch.nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return {"logits": self.fc(self.up(x).mean((2, 3)))}


def optimize_and_load(path):
    import armopt

    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(2, 3, 16, 16)
    written = armopt.optimize(model, (x,), output=path, target="graviton3", batch=(1, 4)).manifest
    loaded = armopt.load(path)
    with torch.no_grad():
        cosine = torch.nn.functional.cosine_similarity(
            loaded(x)["logits"].flatten(), model(x)["logits"].flatten(), 0
        ).item()
    return {
        "torch": torch.__version__,
        "cosine": cosine,
        "gate": written.accuracy.passed,
        "buckets": [dict(plan.bucket) for plan in written.plan],
        "kernels": [[entry.kernel for entry in bound] for bound in loaded.kernels],
    }
