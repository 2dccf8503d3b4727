"""The only readers and writers of users' files: images, transforms, points. Bad input is refused here."""
