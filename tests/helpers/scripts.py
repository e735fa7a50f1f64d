"""A sentence in each script, and its words."""

SENTENCES = {
    "English": ("Don\u2019t \u201csail\u201d: it\u2014sinks", "Don \u2019 t \u201c sail \u201d : it \u2014 sinks"),
    "Chinese": ("他使用Python，航行。", "他 使 用 Python ， 航 行 。"),
    "Japanese": ("データ・かが\u3099う", "デ ー タ ・ か が\u3099 う"),
    "narrow kana": ("ﾃﾞｰﾀ", "ﾃﾞ ｰ ﾀ"),
    "Thai": ("ที่นี่น้ำ ๑๒x", "ที่ นี่ น้ำ ๑๒x"),
    "Lao": ("ລາວເນີ້", "ລ າ ວ ເ ນີ້"),
    "Khmer": ("កម្ពុជា\u200bសួស្តី។", "ក ម្ ពុ ជា សួ ស្ តី ។"),
    "Burmese": ("မြန်မာစာ၊", "မြ န် မာ စာ ၊"),
    "Hindi": ("हिन्दी में क्षत्रिय।", "हिन्दी में क्षत्रिय ।"),
    "Arabic": ("السفينةُ، هل؟", "السفينةُ ، هل ؟"),
    "Persian": ("می\u200cروم «خانه»", "میروم « خانه »"),
    "Hebrew": ("סְפִינָה־ים", "סְפִינָה ־ ים"),
    "Greek": ("πλοίο; καΐκι·", "πλοίο ; καΐκι·"),
    "Turkish": ("İstanbul'daki gemi", "İstanbul ' daki gemi"),
    "Finnish": ("laivoissamme e\u0301tude", "laivoissamme e\u0301tude"),
    "Korean": ("배가 항구에", "배가 항구에"),
    "Tibetan": ("བོད་སྐད", "བོད ་ སྐད"),
    "Amharic": ("መርከብ፣ባሕር", "መርከብ ፣ ባሕር"),
    "emoji": ("boat\u26f5\ufe0f!", "boat \u26f5 \ufe0f !"),
}
