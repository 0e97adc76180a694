//! A change of an image as a whole: old until one write of the header, new from then on.
