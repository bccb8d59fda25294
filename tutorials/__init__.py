"""The course: a folder per chapter, in English and in Chinese. Start with README.md."""
