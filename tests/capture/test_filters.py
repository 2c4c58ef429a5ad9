import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from degflow.capture.filters import blur


@pytest.mark.parametrize("sigma", [0.05, 0.625, 1.5, 3.0])
def test_the_blur_is_scipys(sigma):
    image = torch.rand(2, 3, 30, 41, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reach = math.ceil(4 * sigma)
    expected = scipy.ndimage.gaussian_filter(image.double().numpy(), (0, 0, sigma, sigma), mode="mirror", radius=reach)
    np.testing.assert_allclose(blur(image, sigma), expected, atol=1e-6)


def test_a_blur_wider_than_the_image_is_still_an_image():
    image = torch.rand(1, 3, 9, 24, generator=torch.Generator().manual_seed(0))
    result = blur(image, 6.0)
    assert result.shape == image.shape
    assert float(result.std()) < float(image.std()) / 3


def test_each_image_of_a_batch_is_blurred_by_its_own_sigma():
    image = torch.rand(3, 3, 30, 41, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.7, 2.9, 1.3])
    for n in range(3):
        torch.testing.assert_close(blur(image, sigma)[n], blur(image[n : n + 1], float(sigma[n]))[0], rtol=0, atol=1e-5)
