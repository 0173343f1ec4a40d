"""Operations on codes, each with one meaning and several speeds; knows nothing of files, plans or methods."""
