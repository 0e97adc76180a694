//! Attacks: images, components and guests that try to get out.
