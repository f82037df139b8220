"""Packed signs of keys in a memory: each key is packed once, around the mean of its prompt."""

import copy

import torch

from bitnet_triton.cache import SignsLayer
from bitnet_triton.kernels import SignCodes
from bitnet_triton.kernels.lsh_sampling.tables import mean_of_keys

B, HK, D = 2, 3, 40


class Told:
    """A layer, all keys that it was told, and how many keys were packed at a time."""

    def __init__(self):
        self.layer, self.packed = SignsLayer("mine"), []
        self.keys = torch.empty(B, 0, HK, D)

    def add(self, T):
        new = torch.randn(self.keys.shape[0], T, HK, D) + 0.5
        self.keys = torch.cat([self.keys, new], 1)
        self.layer.update(*(new.transpose(1, 2) for _ in range(2)))

    def check(self, prompt):
        """Compare signs and centre with those that are made of all keys at once."""

        def pack(keys, centre):
            self.packed.append(keys.shape[1])
            return SignCodes.pack(keys, centre)

        codes, centre = self.layer.signs(prompt, lambda keys: mean_of_keys(keys, None), pack)
        torch.testing.assert_close(centre, mean_of_keys(self.keys[:, :prompt], None))
        assert torch.equal(codes, SignCodes.pack(self.keys, centre))


def test_each_key_is_packed_once_around_the_mean_of_the_prompt():
    told = Told()
    for T in (300, 1, 1, 5):
        told.add(T)
        told.check(300)
    assert told.packed == [300, 1, 1, 5]
    told.check(303)  # a prompt that goes on has another mean
    assert told.packed[4:] == [307]


def test_signs_follow_rows_and_what_is_taken_back():
    told = Told()
    told.add(20)
    told.check(18)
    rows = torch.tensor([1, 0, 1])
    told.layer.reorder_cache(torch.tensor([1, 0]))
    told.layer.batch_repeat_interleave(2)
    told.layer.batch_select_indices(torch.tensor([0, 2, 1]))
    told.keys = told.keys[rows]
    told.layer.crop(-2)
    told.keys = told.keys[:, :18]
    told.add(4)
    del told.packed[:]
    twin = copy.deepcopy(told)
    told.check(18)
    assert told.packed == [4]
    twin.layer.crop(-6)  # some of the prompt goes
    twin.keys = twin.keys[:, :16]
    twin.add(3)
    twin.check(18)
    assert twin.packed == [19]
