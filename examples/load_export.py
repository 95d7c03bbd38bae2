"""Load what `fedprompt export RUN_DIR --output DIR` wrote, in plain torch and timm: python load_export.py DIR FILE ...

It covers the kinds of prompts `prompt`, `deep`, `pool` and `none`, with the heads `mlp` and `linear`, on timm's class
VisionTransformer (not Eva and Beit, whose blocks must be told which tokens are prompts). It needs torch, timm,
safetensors, numpy and Pillow, and nothing of fedprompt.
"""

import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file


class ExportedModel(torch.nn.Module):
    """The frozen backbone with the trained prompts and head."""

    def __init__(self, folder):
        super().__init__()
        self.about = json.loads(Path(folder, "model.json").read_text())
        self.trained = load_file(Path(folder, "trained.safetensors"))
        about = self.about["backbone"]
        self.vit = timm.create_model(about["name"], img_size=about["image_size"], num_classes=about["classifier"])
        if type(self.vit).__name__ not in ("VisionTransformer", "VisionTransformerDistilled"):
            sys.exit(f"{folder}: has the backbone {about['name']}; allowed: those of timm's class VisionTransformer")
        self.vit.load_state_dict(load_file(Path(folder, "backbone.safetensors")))
        self.at = 0 if self.vit.cls_token is None else 1  # prompts stand behind the class token
        self.eval()

    def pixels(self, images):
        """Turn uint8 images [n, H, W, 1 or 3] into normalized pixels [n, 3, S, S]."""
        how = self.about["preprocessing"]
        x = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
        size, crop = how["resize"], how["centre_crop"]
        if x.shape[-2:] != (size, size):
            shrinks = max(x.shape[-2:]) > size
            x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)
        margin = (size - crop) // 2
        x = x[..., margin : margin + crop, margin : margin + crop].expand(-1, 3, -1, -1)
        mean, std = (torch.tensor(how[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        return (x - mean) / std

    def inserted(self, prompts, tokens):
        """Put prompts [n, L, D] among tokens [n, T, D]."""
        return torch.cat([tokens[:, : self.at], prompts, tokens[:, self.at :]], dim=1)

    def without(self, count, tokens):
        """Take so many prompts out again."""
        return torch.cat([tokens[:, : self.at], tokens[:, self.at + count :]], dim=1)

    def features(self, tokens, first, prompts=0):
        """Run the blocks from `first` on, and read out, without the prompts."""
        for block in self.vit.blocks[first:]:
            tokens = block(tokens)
        return self.vit.forward_head(self.vit.norm(self.without(prompts, tokens)), pre_logits=True)

    def prompted(self, tokens):
        """Features [n, D] of embedded images [n, T, D], with the trained prompts."""
        kind, layer, depth = self.about["prompt"]["kind"], self.about["prompt"]["layer"], len(self.vit.blocks)
        if kind == "none":
            return self.features(tokens, 0)
        query = self.features(tokens, 0) if kind == "pool" else None
        for block in self.vit.blocks[:layer]:
            tokens = block(tokens)
        if kind in ("prompt", "pool"):
            prompts = self.trained["prompt"].expand(len(tokens), -1, -1) if kind == "prompt" else self.selected(query)
            return self.features(self.inserted(prompts, tokens), layer, prompts.shape[1])
        for block in range(layer, depth - 1):
            prompts = self.trained["deep"][block - layer]
            tokens = self.vit.blocks[block](self.inserted(prompts.expand(len(tokens), -1, -1), tokens))
            tokens = self.without(len(prompts), tokens)
        last = self.trained["deep"][-1].expand(len(tokens), -1, -1)
        return self.features(self.inserted(last, tokens), depth - 1, last.shape[1])

    def selected(self, query):
        """The prompts [n, k, D] of the pool that a batch votes for, or each image's own."""
        pool, how = self.trained["pool"], self.about["prompt"]
        if "query_proj" in self.trained:
            query = query @ self.trained["query_proj"].T
        similarity = F.normalize(query, dim=-1) @ F.normalize(pool, dim=-1).T
        k = min(how["top_k"], len(pool))
        best = similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]
        if how["selection"] == "batch":
            votes = torch.bincount(best.flatten(), minlength=len(pool))
            minor = similarity.sum(0).sort(descending=True, stable=True).indices
            best = minor[votes[minor].sort(descending=True, stable=True).indices][:k].expand(len(query), -1)
        return pool[best]

    @torch.no_grad()
    def forward(self, images):
        """Class scores [n, K] of uint8 images [n, H, W, 1 or 3], in batches as the run had them."""
        scores = []
        for batch in torch.as_tensor(images).split(self.about["batch_size"]):
            vit = self.vit
            tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(self.pixels(batch))))
            x = self.prompted(tokens)
            if self.about["head"]["input"] == "logits":
                x = vit.head(x)
            x = F.linear(x, self.trained["head.1.weight"], self.trained["head.1.bias"])
            if "head.2.weight" in self.trained:
                x = F.linear(x, self.trained["head.2.weight"], self.trained["head.2.bias"])
            scores.append(x)
        return torch.cat(scores)

    def predict(self, images):
        """Names of classes, and probabilities [n, K]."""
        probabilities = self(images).softmax(1)
        return [self.about["classes"][i] for i in probabilities.argmax(1)], probabilities


if __name__ == "__main__":
    model = ExportedModel(sys.argv[1])
    for file in sys.argv[2:]:
        image = np.asarray(Image.open(file).convert("RGB"))
        names, probabilities = model.predict(image[None])
        print(f"{file}  {probabilities.max():.1%}  {names[0]}")
