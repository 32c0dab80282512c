"""The oracle of whole models: real Keras 2 and Keras 3 save small models of every kind, and predict with them.

Run as ``python tests/keras_model_files.py FOLDER``, in a process of its own. For each version of Keras and each model
it leaves in the folder ``k2_nested.h5``, ``k2_nested.keras`` and so on; files without a description, in four formats;
``oracle.npz`` with ``images`` (2, 3, 32, 32) float32 and what Keras gives for them: the features, as
``k2_nested/features``, and, where there is a classifier, ``k2_nested/probabilities``; channels last.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras as keras_3
import numpy as np
import tf_keras as keras_2

SIZE = 32


class Models:
    """The models of a version of Keras; each gives itself, its features and its probabilities or ``None``."""

    def __init__(self, keras: Any) -> None:
        self.keras = keras
        self.layers = keras.layers

    def base(self, name: str = "base", size: int | None = SIZE, prefix: str = "base") -> Any:
        layers = self.layers
        image = layers.Input((size, size, 3))
        x = layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False, name=f"{prefix}_conv")(image)
        x = layers.BatchNormalization(name=f"{prefix}_norm")(x)
        x = layers.ReLU(name=f"{prefix}_relu")(x)
        return self.keras.Model(image, x, name=name)

    def body(self, x: Any) -> Any:
        layers = self.layers
        x = layers.Conv2D(6, 3, activation="relu", name="conv")(x)
        x = layers.BatchNormalization(name="norm")(x)
        return layers.GlobalAveragePooling2D(name="pool")(x)

    def plain(self) -> Any:
        image = self.layers.Input((SIZE, SIZE, 3), name="image")
        features = self.body(image)
        end = self.layers.Dense(5, activation="softmax", name="classifier")(self.layers.Dropout(0.5)(features))
        return self.keras.Model(image, end, name="plain"), features, end

    def no_classifier(self) -> Any:
        image = self.layers.Input((SIZE, SIZE, 3), name="image")
        features = self.body(image)
        return self.keras.Model(image, features, name="no_classifier"), features, None

    def map_only(self) -> Any:
        model = self.base("map_only")
        return model, model.output, None

    def depthwise(self) -> Any:
        image = self.layers.Input((SIZE, SIZE, 3))
        features = self.layers.DepthwiseConv2D(3, name="depthwise")(image)
        return self.keras.Model(image, features), features, None

    def conv_classifier(self) -> Any:
        """As in MobileNet."""
        layers = self.layers
        image = layers.Input((SIZE, SIZE, 3))
        x = layers.Conv2D(6, 3, name="conv")(image)
        features = layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x)
        x = layers.Conv2D(5, 1, use_bias=False, name="classifier")(layers.Dropout(0.1)(features))
        end = layers.Activation("softmax", name="end")(layers.Reshape((5,))(x))
        return self.keras.Model(image, end), features, end

    def heads(self) -> Any:
        layers = self.layers
        image = layers.Input((SIZE, SIZE, 3))
        features = layers.Dense(7, name="common")(self.body(image))
        one, other = layers.Dense(1, activation="sigmoid", name="one")(features), layers.Dense(1, name="two")(features)
        return self.keras.Model(image, [one, other]), features, None

    def nested(self) -> Any:
        """A model in a model in a model, with what Keras' tutorials write around it."""
        layers = self.layers
        inner = self.base()
        image = layers.Input((SIZE, SIZE, 3))
        middle = self.keras.Model(image, layers.Conv2D(3, 1, name="middle_conv")(inner(image)), name="middle")
        inner.trainable = False
        image = layers.Input((SIZE, SIZE, 3))
        x = layers.RandomFlip("horizontal")(image)
        features = layers.GlobalAveragePooling2D(name="pool")(middle(layers.Rescaling(1.0)(x), training=False))
        end = layers.Dense(5, activation="softmax", name="classifier")(features)
        return self.keras.Model(image, end), features, end

    def same_names(self) -> Any:
        """Two nested models whose layers have the same names."""
        layers = self.layers
        image = layers.Input((SIZE, SIZE, 3))
        one, two = self.base("one"), self.base("two")
        features = layers.Concatenate(name="both")([one(image), two(image)])
        return self.keras.Model(image, features), features, None

    def called_twice(self) -> Any:
        """A nested model and a layer that are called twice."""
        layers = self.layers
        image = layers.Input((SIZE, SIZE, 3))
        inner = self.base()
        shared = layers.Conv2D(4, 3, padding="same", activation="tanh", name="shared")
        x = layers.Add(name="sum")([inner(image), inner(layers.Activation("tanh")(image))])
        features = layers.ReLU(name="features")(shared(shared(x)))
        return self.keras.Model(image, features), features, None

    def sequential(self) -> Any:
        layers = self.layers
        model = self.keras.Sequential(
            [
                layers.Input((SIZE, SIZE, 3)),
                layers.Conv2D(4, 3, name="conv"),
                layers.MaxPooling2D(),
                layers.Flatten(name="flat"),
                layers.Dense(5, name="classifier"),
                layers.Activation("softmax", name="end"),
            ]
        )
        return model, model.get_layer("flat").output, model.outputs[0]

    def nested_sequential(self) -> Any:
        """As people put a head on a base."""
        layers = self.layers
        model = self.keras.Sequential(
            [
                layers.Input((SIZE, SIZE, 3)),
                self.base(),
                self.keras.Sequential([layers.Conv2D(4, 3, name="conv"), layers.ReLU()], name="block"),
                layers.GlobalAveragePooling2D(name="pool"),
                layers.Dense(5, activation="softmax", name="classifier"),
            ]
        )
        return model, model.get_layer("pool").output, model.outputs[0]

    def any_size(self) -> Any:
        model = self.base("any_size", None)
        return model, model.output, None

    def numbers(self) -> Any:
        """Arithmetic with numbers, as in MobileNetV3."""
        layers = self.layers
        image = layers.Input((SIZE, SIZE, 3))
        x = layers.Conv2D(6, 3, name="conv")(image)
        gate = layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0)
        x = 1.5 - layers.Multiply()([x, gate]) / 2.0 - 0.25
        features = layers.GlobalAveragePooling2D(name="pool")(x + 2.0 / (gate + 1.0))
        return self.keras.Model(image, features), features, None

    def layers_as_activations(self) -> Any:
        layers = self.layers
        x = image = layers.Input((SIZE, SIZE, 3))
        for activation in (
            layers.ELU(alpha=0.3),
            layers.LeakyReLU(0.4, name="leaky_relu"),
            layers.Softmax(axis=1),
            layers.ReLU(0.05, name="relu"),
        ):
            x = layers.Conv2D(4, 3, activation=activation)(x)
        features = layers.GlobalAveragePooling2D(name="pool")(x)
        return self.keras.Model(image, features), features, None

    def lambda_after(self) -> Any:
        layers = self.layers
        image = layers.Input((SIZE, SIZE, 3))
        features = layers.Dense(7, name="embedding")(self.body(image))
        end = layers.Lambda(lambda x: x * 2, name="doubled", output_shape=(7,))(features)
        return self.keras.Model(image, end), features, None


NAMES = [name for name in vars(Models) if name not in ("base", "body") and not name.startswith("_")]


def _randomise(model: Any, rng: np.random.Generator) -> None:
    values = []
    for weight in model.weights:
        is_variance = "variance" in getattr(weight, "path", weight.name)
        values.append(rng.uniform(0.5, 1.5, weight.shape) if is_variance else rng.normal(0, 0.4, weight.shape))
    model.set_weights(values)


def main(folder: Path) -> None:
    """Writes all files to ``folder``."""
    rng = np.random.default_rng(1)
    images = rng.normal(0, 1, (2, SIZE, SIZE, 3)).astype(np.float32)
    oracle = {"images": images.transpose(0, 3, 1, 2)}
    for version, keras in (("k2", keras_2), ("k3", keras_3)):
        for name in NAMES:
            keras.backend.clear_session()
            model, features, end = getattr(Models(keras), name)()
            if name == "plain":
                model.compile("adam", "categorical_crossentropy")  # its state is saved with the model
                model.fit(images, np.eye(5)[:2], verbose=0)
            _randomise(model, rng)
            model.save(folder / f"{version}_{name}.h5")
            model.save(folder / f"{version}_{name}.keras")
            wanted = {"features": features} | ({} if end is None else {"probabilities": end})
            got = keras.Model(model.inputs, list(wanted.values())).predict(images, verbose=0)
            got = got if isinstance(got, list | tuple) else [got]
            oracle |= {f"{version}_{name}/{key}": np.array(value) for key, value in zip(wanted, got, strict=True)}
    plain, _, _ = Models(keras_2).plain()
    plain.save_weights(folder / "weights.h5")
    plain.save_weights(folder / "plain.weights.h5")
    plain.save(folder / "saved_model")
    plain.save_weights(folder / "checkpoint" / "weights")
    np.savez(folder / "oracle.npz", **oracle)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
