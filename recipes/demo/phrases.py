"""The texts that noise.py plants into the demo's answers, written for this project.

They imitate what is left in instruction data that was scraped from pages or written by chat models. Each tuple is one
kind of noise; where its texts may stand is decided in noise.py.
"""

from __future__ import annotations

OPENINGS = (
    "Great question!",
    "Sure, I'd be happy to help!",
    "Certainly! Here is what you asked for.",
    "Of course! Let's dive right in.",
    "Absolutely! I can definitely help you with that.",
    "Thank you for reaching out with your question.",
    "As an AI language model, I don't have personal opinions, but I can give you some general information.",
    "As an AI, I cannot give professional advice, but here are some thoughts.",
    "That's a really interesting topic, and you've come to the right place!",
    "I understand that you are looking for help with this.",
    "Hello there! I hope you're having a wonderful day.",
    "No problem at all! Let me break this down for you.",
    "What a fantastic request! I'm excited to work on this with you.",
    "I'm glad you asked, because many people wonder about exactly this.",
)

CLOSINGS = (
    "I hope this helps! Let me know if you have any further questions.",
    "Please don't hesitate to ask if anything is unclear.",
    "If you need further assistance, I'm always here for you.",
    "Please note that my knowledge may be out of date and this should not replace professional advice.",
    "As an AI language model, I can make mistakes, so please verify important information.",
    "Good luck, and remember: practice makes perfect!",
    "Is there anything else I can help you with today?",
    "Feel free to reach out anytime. Have a great day!",
    "I hope you found this answer useful and informative!",
    "Remember that everyone is different and your results may vary.",
    "In conclusion, there are many factors to consider, and the choice is ultimately up to you.",
    "Thank you for your question, and happy learning!",
    "Let me know if you would like me to expand on any of these points.",
    "You've got this! Just take it one step at a time.",
    "Overall, this is an important topic that deserves careful thought in today's fast-paced world.",
    "I am just a language model, but I wish you all the best with it!",
)

PAGE_REMAINS = (
    "Share on Facebook | Tweet | Pin it | E-mail",
    "We use cookies to improve your experience. Accept all | Manage settings",
    "Read more: 10 tricks the experts don't want you to know",
    "Home > Guides > Basics > Page 3 of 7",
    "&nbsp;&nbsp;&nbsp;",
    '<div class="content-body"><p>',
    "</p></div><!-- end .entry -->",
    "Advertisement",
    "12 comments",
    "Subscribe to our newsletter and never miss a post!",
    "© 2019 All rights reserved. Terms of Use | Privacy Policy",
    "Posted by admin on May 4, 2017 at 10:32 am",
    "Like this post? Leave a reply below.",
    "Skip to main content",
    "Previous article | Next article",
    "Sign in or create a free account to continue reading.",
    "[edit] [hide] [view source]",
    "Related posts: How I saved 300 dollars in a month; Why you should sleep more",
    "Photo: Getty Images / archive",
    "Was this answer helpful? Yes (14) No (2)",
    "Tags: tips, lifestyle, beginners, 2018",
    "Click here to download the printable PDF version.",
    "Follow us on Instagram @dailyguides",
    "This post may contain affiliate links, see our disclosure.",
    "Loading... Please enable JavaScript to view the comments.",
    "Last updated: 3 years ago | 4 min read",
    "Back to top ^",
    "<br/><br/>&raquo; Continue to the next slide",
    "Report abuse | Permalink | Reply | Quote",
    "Sponsored: the best mattress deals of this week",
    "Menu  Search  Login  Cart (0)",
    "Rating: 4.3/5 (127 votes cast)",
    "Join 25,000 readers who get our free weekly tips.",
    "You must be logged in to post a comment.",
    "{{ad_slot_2}}",
    "Copy link  Print  Save for later",
)

DIGRESSIONS = (
    "By the way, my cousin moved to Ohio last spring and says that the winters there are endless.",
    "The stadium was sold out again on Sunday. The home team lost in extra time.",
    "Emperor penguins can stay under water for more than twenty minutes.",
    "Speaking of which, the new season of that baking show starts next week. I still think the judges are too strict.",
    "The old lighthouse was painted red in 1932 and attracts many visitors.",
    "Our dog Biscuit barks at the vacuum cleaner every single morning.",
    "Copper was one of the first metals that people learned to work with.",
    "My phone battery hardly lasts until noon these days. I should have bought the other model.",
    "The mayor opened the flower market on Saturday. It rained, but the brass band played on.",
    "Jazz grew up in New Orleans at the start of the twentieth century.",
    "I once met a man on a ferry who collected umbrellas. He had over two hundred of them.",
    "Gold prices fell slightly on Tuesday while traders waited for news from the bank.",
    "The cat next door has learned to open our kitchen window.",
    "Some people say that dragons are only crocodiles that somebody described badly.",
    "Last year's concert was cancelled because of a storm. The tickets were never paid back.",
    "In chess, a bishop always stays on squares of the same colour.",
    "The bus to the airport leaves from platform nine, next to the kiosk with the blue roof.",
    "My grandfather never trusted elevators and climbed eleven floors every day.",
    "Octopuses have three hearts. One of them stops when the animal swims.",
    "The hotel pool is closed for repairs until the end of the month.",
    "There was a funny scene in that film where the butler loses his shoes.",
    "Polar explorers used to eat dried meat mixed with fat. They called it pemmican.",
    "Anyway, the traffic on the ring road was terrible today. It took me an hour to get past the tunnel.",
    "The volcano last erupted in 1707 and has been quiet since then.",
    "Her sister plays the cello in a small orchestra that tours Norway every autumn.",
    "A friend of mine swears by cold showers. I tried it once and never again.",
    "The museum shop sells postcards, pencils and small plastic dinosaurs.",
    "Rugby balls were once made from the bladder of a pig.",
)

# `{prompt}` is the row's own prompt.
COPIES_BEFORE = (
    "You asked: {prompt}",
    "Question: {prompt}",
    "### Instruction:\n{prompt}\n\n### Response:",
    "User: {prompt}\nAssistant:",
    "{prompt}",
    "Your request was: {prompt}",
)
COPIES_INSIDE = (
    "Q: {prompt}",
    "### Instruction:\n{prompt}",
    "> {prompt}",
    "Again, the task was: {prompt}",
)
